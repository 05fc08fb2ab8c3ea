"""Reads NumPy archives (`.npz`), and of one that is cut short what is whole."""

import contextlib
import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from experiments.weights import limits
from experiments.weights.tree import CutShortError, WeightsError

HEADER = struct.Struct("<4s5H3I2H")  # of a file in a zip archive, before its name
SIGNATURE = b"PK\x03\x04"
STORED, DEFLATED = 0, 8
IN_EXTRA = 0xFFFFFFFF  # a size that stands in the extra field, which 64-bit sizes need


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive; pickled objects in it are refused.

    Raises:
      CutShortError: the directory at the end is missing; with the arrays that are whole.
      WeightsError: it is no such archive.
    """
    path = Path(path)
    with limits.refusing(path, "not an .npz archive, or damaged"):
        contents = limits.read_bytes(path)
        if contents.startswith(SIGNATURE) and not zipfile.is_zipfile(io.BytesIO(contents)):
            raise CutShortError("cut short", _whole_arrays(contents))
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if sum(info.file_size for info in members.values()) > limits.MAX_BYTES:
                raise WeightsError(f"its arrays take more than {limits.MAX_BYTES} bytes")
            arrays = {}
            for name, info in members.items():
                with archive.open(info) as member:
                    arrays[name.removesuffix(".npy")] = _read_array(member, info.file_size)
            return arrays


def _read_array(file: IO[bytes], size: int) -> np.ndarray:
    """The array of an `.npy` file of so many bytes, which its header must fit."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, is_fortran, dtype = read_header[version](file)
    if dtype.hasobject or dtype.itemsize == 0:
        raise WeightsError(f"an array of {dtype}: objects are pickles, which are not read")
    shape = limits.checked_shape(shape, dtype)
    count = math.prod(shape)
    if count * dtype.itemsize > size:
        raise WeightsError(f"an array of shape {shape} in {size} bytes")
    data = file.read(count * dtype.itemsize)
    flat = np.frombuffer(data, dtype, count)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def _whole_arrays(contents: bytes) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    room = limits.MAX_BYTES
    # What is there may be damaged.
    with contextlib.suppress(ValueError, LookupError, struct.error, zlib.error, EOFError):
        for name, array in _walk(contents):
            room -= array.nbytes
            if room < 0:
                break
            arrays[name] = array
    return arrays


def _walk(contents: bytes) -> Iterator[tuple[str, np.ndarray]]:
    """Goes from header to header, as the directory that says where they are is lost."""
    position = 0
    while len(contents) >= position + HEADER.size:
        signature, _, _, method, _, _, _, stored, _, name_length, extra_length = HEADER.unpack_from(
            contents, position
        )
        start = position + HEADER.size + name_length + extra_length
        if signature != SIGNATURE or method not in (STORED, DEFLATED) or start > len(contents):
            return
        name = contents[position + HEADER.size :][:name_length].decode()
        if stored == IN_EXTRA:  # after an id, a length and the size before compression
            _, _, _, stored = struct.unpack_from("<2H2Q", contents, start - extra_length)
        position = start + stored
        data = contents[start:position]
        if len(data) < stored or not stored:
            return
        if method == DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, limits.MAX_BYTES)
        yield name.removesuffix(".npy"), _read_array(io.BytesIO(data), len(data))
