"""A strict safetensors file that seals itself, and says what it is.

The layout is that of safetensors (https://github.com/huggingface/safetensors), so its readers open
the file: the length of the header as a little-endian uint64, the header in JSON, padded with spaces
to a multiple of 8 bytes, then the data of the tensors, little-endian, without gaps, in the order of
the header.  The header's `__metadata__` maps strings to strings.  On top of that

    "format" and "format_version" of the metadata say what the file is, see `Format`,
    "crc32" of the metadata holds a checksum of every tensor, which tells which one is damaged,
    the last tensor, "jaxquant/sha256", is the SHA-256 of every byte before its own.

Nothing is read through a name in the file: names are keys of a dict, never paths on a disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import parse_json
from jaxquant.files.tensor_names import split

SEAL = "jaxquant/sha256"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_FILE_BYTES = 2**36

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Format(NamedTuple):
    """What a file says it is: the metadata "format" and "format_version", and what to call it."""

    name: str
    version: str
    what: str  # "a ... that jaxquant.some_function wrote"


def chunks(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], form: Format
) -> Iterator[Any]:
    """The bytes of the file, piece by piece.

    Raises:
      ValueError: a name or a dtype cannot be saved.
    """
    arrays = {name: _plain(name, array) for name, array in tensors.items()}
    # Wide elements first: with the padded header, every array is aligned to its element size.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    sums = " ".join(f"{zlib.crc32(_bytes(arrays[name])):08x}" for name in names)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": form.name,
            "format_version": form.version,
            **metadata,
            "crc32": sums,
        }
    }
    offset = 0
    for name in names:
        array = arrays[name]
        header[name] = _entry(array.dtype, array.shape, offset)
        offset += array.nbytes
    header[SEAL] = _entry(np.dtype("u1"), (hashlib.sha256().digest_size,), offset)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {len(names)} tensors takes {len(text)} bytes: too many")
    digest = hashlib.sha256()
    pieces: list[Any] = [struct.pack("<Q", len(text)), text]
    for piece in pieces + [_bytes(arrays[name]) for name in names]:
        digest.update(piece)
        yield piece
    yield digest.digest()


def read(
    path: str | os.PathLike[str], form: Format
) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """The tensors, the metadata and the SHA-256 (hexadecimal) of a file, all of them checked.

    Raises:
      FileError: the file is not of that format and version, or is damaged, cut short or too large.
      OSError: it cannot be read.
    """
    contents = _read_file(path)
    try:
        header, start = _header(contents)
        metadata = _metadata(header, form)
        places = _places(header, len(contents) - start)
        digest = _check_seal(contents, start, places, metadata)
        tensors = {
            name: _array(name, contents, start, place)
            for name, place in places.items()
            if name != SEAL
        }
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None
    return tensors, metadata, digest


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    little = array.dtype.newbyteorder("<") if array.dtype.kind in "iufc" else array.dtype
    if little not in _CODES:
        raise ValueError(f"{name!r} has dtype {array.dtype}, which a safetensors file cannot hold")
    return np.asarray(array, little, order="C")


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _entry(dtype: np.dtype, shape: tuple[int, ...], offset: int) -> dict[str, Any]:
    end = offset + math.prod(shape) * dtype.itemsize
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}


def _read_file(path: str | os.PathLike[str]) -> bytes:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{os.fspath(path)}: not a plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise FileError(
                f"{os.fspath(path)}: {status.st_size} bytes; at most {MAX_FILE_BYTES} are read"
            )
        with open(handle, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(handle)


def _header(contents: bytes) -> tuple[dict[str, Any], int]:
    """The header and the place where the data starts."""
    if len(contents) < 8:
        raise FileError(f"cut short: {len(contents)} bytes")
    (length,) = struct.unpack_from("<Q", contents)
    if length > MAX_HEADER_BYTES:
        raise FileError(
            f"not a safetensors file, or its header is damaged: the header's length is {length}"
        )
    if 8 + length > len(contents):
        raise FileError(f"cut short: the header takes {length} bytes, the file has {len(contents)}")
    header = parse_json(contents[8 : 8 + length], "header")
    return header, 8 + length


def _metadata(header: dict[str, Any], form: Format) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text or metadata.get("format") != form.name:
        raise FileError(f"not {form.what}")
    version = metadata.get("format_version", "")
    if version != form.version:
        raise FileError(
            f"format version {version[:20]!r}; this release of jaxquant reads {form.version!r}"
        )
    return metadata


Place = tuple[np.dtype, tuple[int, ...], int, int]


def _places(header: dict[str, Any], size: int) -> dict[str, Place]:
    """Tensor -> dtype, shape, start and end in the data; they fill the data without gaps."""
    places: dict[str, Place] = {}
    position = 0
    for name in header:
        split(name)
    for name, entry in header.items():
        dtype, shape, start, end = _place(name, entry)
        if start != position:
            raise FileError(f"tensor {name!r} starts at {start}, not at {position}")
        position = end
        places[name] = (dtype, shape, start, end)
    if next(reversed(places), None) != SEAL or places[SEAL][:2] != (DTYPES["U8"], (32,)):
        raise FileError(f"the header is damaged: it does not end with {SEAL!r}")
    if position > size:
        raise FileError(f"cut short: the tensors take {position} bytes, {size} are there")
    if position < size:
        raise FileError(f"{size - position} bytes follow the last tensor")
    return places


def _place(name: str, entry: Any) -> Place:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"tensor {name!r}: its header entry is damaged")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise FileError(f"tensor {name!r}: unknown dtype {str(code)[:20]!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise FileError(f"tensor {name!r}: its shape or offsets are damaged")
    dtype, (start, end) = DTYPES[code], offsets
    if end - start != math.prod(shape) * dtype.itemsize:
        raise FileError(
            f"tensor {name!r}: shape {shape} of {code} does not take {end - start} bytes"
        )
    return dtype, tuple(shape), start, end


def _are_sizes(values: Any) -> bool:
    """True for a list of sizes; bool is an int in Python, and no array has so many axes."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v < 2**48 for v in values)
    )


def _check_seal(
    contents: bytes, start: int, places: Mapping[str, Place], metadata: Mapping[str, str]
) -> str:
    """The SHA-256 of the whole file, once the one inside it matches."""
    end = start + places[SEAL][2]
    digest = hashlib.sha256(memoryview(contents)[:end])
    if digest.digest() == contents[end:]:
        digest.update(contents[end:])
        return digest.hexdigest()
    sums = metadata.get("crc32", "").split(" ")
    names = [name for name in places if name != SEAL]
    data = memoryview(contents)[start:]
    found = [f"{zlib.crc32(data[places[n][2] : places[n][3]]):08x}" for n in names]
    damaged = [name for name, known, here in zip(names, sums, found) if known != here]
    if len(sums) != len(names) or not damaged:
        raise FileError("the header or the checksum of the file is damaged")
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    shown = ", ".join(map(repr, damaged[:3]))
    raise FileError(f"damaged: the checksum of {shown}{more} does not match")


def _array(name: str, contents: bytes, start: int, place: Place) -> np.ndarray:
    dtype, shape, begin, end = place
    raw = np.frombuffer(contents, np.uint8, end - begin, start + begin)
    if dtype.kind == "b" and (raw > 1).any():
        raise FileError(f"tensor {name!r}: a truth value is neither 0 nor 1")
    return raw.view(dtype).reshape(shape)
