"""What a weight file may ask for: it may come from anywhere."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.weights.tree import WeightsError

MAX_BYTES = 2**31  # of a file, and of the arrays that are made of it
MAX_JSON_BYTES = 2**24
MAX_JSON_VALUES = 2**20  # Python makes some hundred bytes of each
MAX_AXES = 32


def read_bytes(path: Path) -> bytes:
    """The contents of a file.

    Raises:
      WeightsError: it is too large, or no plain file.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: not a plain file")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise WeightsError(f"{path}: {size} bytes; at most {MAX_BYTES} are read")
    return path.read_bytes()


def parse_json(text: bytes) -> Any:
    """JSON whose size is bounded before it is parsed.

    Raises:
      ValueError: it is not JSON, or too large.
    """
    if len(text) > MAX_JSON_BYTES or sum(map(text.count, b"[{,")) > MAX_JSON_VALUES:
        raise ValueError(f"{len(text)} bytes of JSON are too many, or too many values")
    return json.loads(text)


def checked_shape(shape: Any, dtype: np.dtype) -> tuple[int, ...]:
    """A shape, once it is known that an array can have it.

    Raises:
      ValueError: it cannot.
    """
    sizes = tuple(shape)
    if len(sizes) > MAX_AXES or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{str(shape)[:60]} is no shape of an array")
    total = dtype.itemsize
    for size in sizes:
        total *= max(size, 1)  # an axis of size 0 hides no other
        if total > MAX_BYTES:
            raise ValueError(f"an array of shape {str(shape)[:60]} is too large")
    return sizes


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Whatever damage makes the code inside raise becomes a WeightsError.

    Errors of the system (no such file, no permission) come through where they name the file.
    """
    try:
        yield
    except WeightsError as error:
        if str(path) not in str(error):
            error.args = (f"{path}: {error}",)
        raise
    except MemoryError as error:
        raise WeightsError(f"{path}: {what}, or too large for the memory") from error
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # of zipfile, zlib, struct, NumPy, h5py, ..., by what is damaged
        raise WeightsError(f"{path}: {what}: {type(error).__name__}: {error!s:.200}") from error
