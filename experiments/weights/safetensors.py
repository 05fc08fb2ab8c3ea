"""Reads `.safetensors`: a length, a JSON header, then the arrays, little-endian."""

import math
import operator
import struct
from pathlib import Path

import ml_dtypes
import numpy as np

from experiments.weights import limits
from experiments.weights.tree import WeightsError, shortened

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The names and arrays of a file.

    Raises:
      WeightsError: it is not such a file, or is cut short (naming what it lacks).
    """
    path = Path(path)
    with limits.refusing(path, "not a .safetensors file, cut short or damaged"):
        contents = limits.read_bytes(path)
        (length,) = struct.unpack_from("<Q", contents)
        header = limits.parse_json(contents[8 : 8 + length])
        header.pop("__metadata__", None)
        data = memoryview(contents)[8 + length :]
        arrays, missing = {}, []
        for name, entry in header.items():
            dtype = DTYPES[entry["dtype"]]
            shape = limits.checked_shape(entry["shape"], dtype)
            start, end = (operator.index(offset) for offset in entry["data_offsets"])
            whole = end - start == dtype.itemsize * math.prod(shape)
            if not (0 <= start <= end <= len(data) and whole):
                missing.append(name)
            else:
                arrays[name] = np.frombuffer(data[start:end], dtype).reshape(shape)
    if missing:
        raise WeightsError(
            f"{path}: cut short: {len(missing)} of {len(header)} parameters are missing:\n  "
            + "\n  ".join(shortened(missing))
        )
    return arrays
