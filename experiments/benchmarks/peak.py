"""The most that this machine's cores do: int8 operations on registers, and copies of memory."""

import ctypes
import functools
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxquant.native import compiler

_SOURCE = Path(__file__).with_name("peak.cc")
_OPERATIONS = 1 << 34  # of a thread in one run
_BYTES = 1 << 27  # that are copied in one run, far more than caches hold


class Peak:
    """Two programs to time in turn with others, which use all cores that this process may use.

    Attributes:
      operations: multiplications and additions of one run of `multiply`; 0 where it does nothing,
        on a CPU with neither AMX nor AVX512-VNNI.
      bytes: read and written by one run of `copy`.
    """

    def __init__(self) -> None:
        self._library = _compiled()
        self._threads = len(os.sched_getaffinity(0))
        self._from, self._to = (np.ones(_BYTES, np.uint8) for _ in range(2))
        self.bytes = 2 * _BYTES
        self.operations = self.multiply()

    @property
    def programs(self) -> dict[str, Callable[[], Any]]:
        return {"multiply": self.multiply, "copy": self.copy}

    def shares(
        self, operations: float, bytes_moved: float, medians: Mapping[str, float]
    ) -> tuple[float, float]:
        """What part of the peaks so many operations and bytes a second are; NaN where not known.

        Args:
          medians: the seconds of both programs.
        """
        most = self.operations / medians["multiply"]
        share = operations / most if most else math.nan
        return share, bytes_moved / (self.bytes / medians["copy"])

    def multiply(self) -> int:
        return self._library.multiply_int8(self._threads, _OPERATIONS)

    def copy(self) -> None:
        self._library.copy_bytes(
            self._threads, self._from.ctypes.data_as(ctypes.c_char_p),
            self._to.ctypes.data_as(ctypes.c_char_p), _BYTES,
        )  # fmt: skip


@functools.cache
def _compiled() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "peak.so")
        flags = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread"]
        subprocess.run(
            [*compiler.find_compiler(), *flags, str(_SOURCE), "-o", str(path)], check=True
        )
        library = ctypes.CDLL(str(path))
    library.multiply_int8.argtypes = [ctypes.c_int64] * 2
    library.multiply_int8.restype = ctypes.c_int64
    library.copy_bytes.argtypes = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    library.copy_bytes.restype = None
    return library
