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
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxquant.files import strict_json
from jaxquant.files.errors import FileError
from jaxquant.files.tensor_names import split

SEAL = "jaxquant/sha256"
MAX_HEADER_BYTES = strict_json.MAX_BYTES
MAX_FILE_BYTES = 2**36
_MAX_SIZE = 2**31  # of an axis

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
    "C64": np.dtype("<c8"),
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
    # Last of all, so that everything before it can be summed up while it is written.
    header[SEAL] = _entry(np.dtype("u1"), (hashlib.sha256().digest_size,), offset)
    text = strict_json.dump_json(header, f"header of {len(names)} tensors")
    text += b" " * (-len(text) % 8)
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
    try:
        with _open(path) as file:
            size = _size(file)
            head, header = _header(file, size)
            metadata = _metadata(header, form)
            # What the data is said to be fits the file before memory is taken for it.
            places = _places(header, size - len(head))
            data = file.read(size - len(head))
        digest = _check_seal(head, data, places, metadata)
        tensors = {
            name: _array(name, data, place) for name, place in places.items() if name != SEAL
        }
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None
    except MemoryError:
        raise FileError(f"{os.fspath(path)}: it does not fit into memory") from None
    return tensors, metadata, digest


def _plain(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    # Files are little-endian; truth values and 8-bit floats have no byte order.
    little = array.dtype.newbyteorder("<") if array.dtype.kind in "iufc" else array.dtype
    if little not in _CODES:
        raise ValueError(f"{name!r} has dtype {array.dtype}, which a safetensors file cannot hold")
    return np.asarray(array, little, order="C")


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _entry(dtype: np.dtype, shape: tuple[int, ...], offset: int) -> dict[str, Any]:
    end = offset + math.prod(shape) * dtype.itemsize
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileError("not a plain file")
    return open(handle, "rb")


def _size(file: BinaryIO) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > MAX_FILE_BYTES:
        raise FileError(f"{size} bytes; at most {MAX_FILE_BYTES} are read")
    return size


def _header(file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    """All bytes before the data, and the header among them."""
    start = file.read(8)
    if len(start) < 8:
        raise FileError(f"cut short: {size} bytes")
    (length,) = struct.unpack("<Q", start)
    # Any eight bytes are a length: a large one is of another kind of file.
    if length > MAX_HEADER_BYTES:
        raise FileError(
            f"not a safetensors file, or its header is damaged: the header's length is {length}"
        )
    if 8 + length > size:
        raise FileError(f"cut short: the header takes {length} bytes, the file has {size}")
    text = file.read(length)
    return start + text, strict_json.parse_json(text, "header")


def _metadata(header: dict[str, Any], form: Format) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not is_text or metadata.get("format") != form.name:
        raise FileError(f"not {form.what}")

    # Older and newer versions say different things under the same names.
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
    # Names are checked before they are shown or looked up.
    for name in header:
        split(name)
    for name, entry in header.items():
        dtype, shape, start, end = _place(name, entry)
        # Without gaps and in order: nothing can hide between two tensors.
        if start != position:
            raise FileError(f"tensor {name!r} starts at {start}, not at {position}")
        position = end
        places[name] = (dtype, shape, start, end)
    if next(reversed(places), None) != SEAL or places[SEAL][:2] != (DTYPES["U8"], (32,)):
        raise FileError(f"the header is damaged: it does not end with {SEAL!r}")
    # Too short is an interrupted copy, too long a file that something was appended to.
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
    dtype = DTYPES[code]
    if not _are_sizes(offsets, MAX_FILE_BYTES) or len(offsets) != 2 or not _is_shape(shape, dtype):
        raise FileError(f"tensor {name!r}: its shape or offsets are damaged")
    start, end = offsets
    # Shape, dtype and offsets say the same thing three times.
    if end - start != math.prod(shape) * dtype.itemsize:
        raise FileError(
            f"tensor {name!r}: shape {shape} of {code} does not take {end - start} bytes"
        )
    return dtype, tuple(shape), start, end


def _is_shape(shape: Any, dtype: np.dtype) -> bool:
    """True for a shape that arrays can have.

    An axis without elements hides no other: NumPy refuses [2**47, 2**47, 0] too.
    """
    if not _are_sizes(shape, _MAX_SIZE):
        return False
    return math.prod(max(size, 1) for size in shape) * dtype.itemsize <= MAX_FILE_BYTES


def _are_sizes(values: Any, largest: int) -> bool:
    """True for a list of sizes; bool is an int in Python, and no array has so many axes."""
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(v) is int and 0 <= v <= largest for v in values)
    )


def _check_seal(
    head: bytes, contents: bytes, places: Mapping[str, Place], metadata: Mapping[str, str]
) -> str:
    """The SHA-256 of the whole file, once the one inside it matches."""
    data, end = memoryview(contents), places[SEAL][2]
    digest = hashlib.sha256(head)
    digest.update(data[:end])
    if digest.digest() == data[end:]:
        digest.update(data[end:])
        return digest.hexdigest()
    # Damaged: the sums of the single tensors tell where.
    sums = metadata.get("crc32", "").split(" ")
    names = [name for name in places if name != SEAL]
    found = [f"{zlib.crc32(data[places[n][2] : places[n][3]]):08x}" for n in names]
    damaged = [name for name, known, here in zip(names, sums, found) if known != here]
    if len(sums) != len(names) or not damaged:
        raise FileError("the header or the checksum of the file is damaged")
    more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
    shown = ", ".join(map(repr, damaged[:3]))
    raise FileError(f"damaged: the checksum of {shown}{more} does not match")


def _array(name: str, data: bytes, place: Place) -> np.ndarray:
    dtype, shape, start, end = place
    raw = np.frombuffer(data, np.uint8, end - start, start)
    # NumPy would take any byte for true, and compute with the byte.
    if dtype.kind == "b" and (raw > 1).any():
        raise FileError(f"tensor {name!r}: a truth value is neither 0 nor 1")
    return raw.view(dtype).reshape(shape)
