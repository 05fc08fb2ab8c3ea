"""What learned rounding has finished, in a file: an interrupted run loses one site."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxquant.files import atomic

_PREFIX = "site:"
_DIGEST, _ERRORS = 32, 16  # bytes


class Rounding(NamedTuple):
    """up: bool, which weights are rounded up; the site's errors with nearest and with this one."""

    up: np.ndarray
    nearest: float
    learned: float


class Roundings:
    """The roundings of the sites that are done, kept in an .npz file where a path is given.

    A site's rounding is known by a digest of its weight, inputs and outputs, so one of another
    model or of other data is never taken.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self._path = None if path is None else Path(path)
        self._records: dict[str, np.ndarray] = {}
        if self._path is not None and self._path.exists():
            self._records = _read(self._path)

    def get(self, name: str, digest: bytes, shape: tuple[int, ...]) -> Rounding | None:
        """The rounding of a site; None where it is not there or of other data."""
        record = self._records.get(name)
        if record is None or record[:_DIGEST].tobytes() != digest:
            return None
        errors = record[_DIGEST : _DIGEST + _ERRORS].view(np.float64)
        bits = np.unpackbits(record[_DIGEST + _ERRORS :], count=int(np.prod(shape)))
        return Rounding(bits.astype(bool).reshape(shape), float(errors[0]), float(errors[1]))

    def put(self, name: str, digest: bytes, rounding: Rounding) -> None:
        """Keep a rounding, and write the file anew beside the old one."""
        if self._path is None:
            return
        errors = np.array([rounding.nearest, rounding.learned], np.float64)
        self._records[name] = np.concatenate(
            [np.frombuffer(digest, np.uint8), errors.view(np.uint8), np.packbits(rounding.up)]
        )
        buffer = io.BytesIO()
        np.savez(buffer, **{_PREFIX + k: v for k, v in self._records.items()})  # type: ignore[arg-type]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(self._path, [buffer.getvalue()])


def digest(*arrays: np.ndarray) -> bytes:
    """32 bytes that tell arrays apart."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.digest()


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        # np.load leaves a damaged file open where it opened it itself
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as records:
            if not all(key.startswith(_PREFIX) for key in records.files):
                raise ValueError("it holds other arrays")
            return {key[len(_PREFIX) :]: records[key] for key in records.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ValueError(
            f"recovery_file={str(path)!r} is not a file of learned roundings ({error}); delete it "
            "or give another path"
        ) from error
