"""Reads PyTorch checkpoints (`.pth`) without PyTorch and without an open pickle.

Both containers are read: the zip archive of PyTorch 1.6 and later, and the stream of pickles before
it. A pickle may name any callable of the machine, so the few names that a dict of tensors consists
of are resolved here, to functions of this file, and every other name is refused. Sizes are those of
the file: an array is made of bytes that are there, and none repeats them.
"""

import io
import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from experiments.weights import limits, pickles
from experiments.weights.tree import WeightsError, shortened

# The old container opens with three pickles: this number, the protocol and facts of the machine.
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
ZIP_SIGNATURE = b"PK\x03\x04"
HEADER_SIZE = 30  # of a file in a zip archive; it ends with the lengths of the name and of extras
MAX_PICKLE_BYTES = 2**26


class StorageType(NamedTuple):
    """The element type of a flat buffer, little-endian."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A flat buffer that tensors are views of."""

    dtype: np.dtype
    key: str
    size: int  # in elements

    @property
    def bytes(self) -> int:
        return self.size * self.dtype.itemsize


class Tensor(NamedTuple):
    """A strided view of a storage, offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGE_TYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def read_pth(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint: parameter names to arrays.

    A checkpoint that keeps its state dict beside other things, under "state_dict", is understood,
    and so is the "module." that data-parallel training puts before every name.

    Raises:
      WeightsError: the file is no checkpoint, is cut short (naming the parameters that it lacks),
        or its pickle asks for anything but tensors.
    """
    path = Path(path)
    with limits.refusing(path, "cut short, damaged or not a PyTorch checkpoint"):
        contents = limits.read_bytes(path)
        if zipfile.is_zipfile(io.BytesIO(contents)):
            return _read_zip(contents)
        if contents.startswith(ZIP_SIGNATURE):
            return _read_cut_zip(contents)
        return _read_stream(contents)


def _read_zip(contents: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(contents)) as archive:
        members = {info.filename: info for info in archive.infolist()}
        pickled = [n for n in members if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickled) != 1:
            raise WeightsError("a zip archive without a checkpoint's data.pkl")
        root = pickled[0].removesuffix("data.pkl")

        def read(name: str, at_most: int) -> bytes:
            # PyTorch compresses nothing; some bytes could become any number of them otherwise.
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise WeightsError(f"{name} is compressed, which PyTorch does not do")
            if members[name].file_size > at_most:
                raise WeightsError(f"{name} has {members[name].file_size} bytes; at most {at_most}")
            return archive.read(members[name])

        if f"{root}byteorder" in members and read(f"{root}byteorder", 16) != b"little":
            raise WeightsError("big-endian checkpoints are not supported")
        tensors = _state_dict(_load(io.BytesIO(read(pickled[0], MAX_PICKLE_BYTES))))
        storages = _storages(tensors, len(contents))
        buffers = {
            key: read(name, max(storage.bytes, 1) + limits.MAX_BYTES // 2**10)
            for key, storage in storages.items()
            if (name := f"{root}data/{key}") in members
        }
    return _arrays(tensors, buffers)


def _read_cut_zip(contents: bytes) -> dict[str, np.ndarray]:
    """Raises an error that names what is lost: the directory of the archive is, at its end."""
    places: dict[bytes, int] = {}  # of what is there of each file
    place = -1
    while (place := contents.find(ZIP_SIGNATURE, place + 1)) >= 0:
        header = contents[place : place + HEADER_SIZE]
        if len(header) == HEADER_SIZE:
            name_length, extra_length = struct.unpack("<2H", header[-4:])
            start = place + HEADER_SIZE
            places[contents[start : start + name_length]] = start + name_length + extra_length

    data = memoryview(contents)
    (name_length,) = struct.unpack_from("<H", contents, HEADER_SIZE - 4)
    root = contents[HEADER_SIZE:][:name_length].partition(b"/")[0]
    start = places.get(root + b"/data.pkl", len(data))
    pickled = bytes(data[start : start + MAX_PICKLE_BYTES])
    tensors = _state_dict(_load(io.BytesIO(pickled)))
    buffers = {}
    for key, storage in _storages(tensors, limits.MAX_BYTES).items():
        start = places.get(root + b"/data/" + key.encode(), len(data))
        buffers[key] = data[start : start + storage.bytes]
    _arrays(tensors, buffers)
    raise WeightsError("cut short behind the last parameter")


def _read_stream(contents: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(contents)
    opening = tuple(_load(file) for _ in range(2))
    if opening != (MAGIC_NUMBER, PROTOCOL_VERSION):
        raise WeightsError(f"not a PyTorch checkpoint: it opens with {opening!r:.80}")
    machine = _load(file)
    if not machine.get("little_endian", True):
        raise WeightsError("big-endian checkpoints are not supported")
    tensors = _state_dict(_load(file))
    storages = _storages(tensors, limits.MAX_BYTES)
    buffers = {}
    for key in _load(file):
        header = file.read(8)
        if len(header) < 8:
            break
        (size,) = struct.unpack("<q", header)
        if type(key) is not str or key not in storages or size != storages[key].size:
            raise WeightsError(f"storage {key!r:.40} has {size} elements, unlike its tensors")
        buffers[key] = file.read(storages[key].bytes)
    return _arrays(tensors, buffers)


def _load(file: BinaryIO) -> Any:
    return pickles.load(file, _find, _refer)


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise WeightsError(f"holds a {type(loaded).__name__} where a state dict should be")
    tensors = {str(k).removeprefix("module."): v for k, v in loaded.items()}
    others = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise WeightsError(f"not a state dict of tensors: {shortened(others)}")
    return tensors


def _storages(tensors: dict[str, Tensor], room: int) -> dict[str, Storage]:
    """The storages of tensors by their keys, which fit into so many bytes."""
    storages: dict[str, Storage] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storages.setdefault(storage.key, storage) != storage:
            raise WeightsError(f"two storages are called {storage.key!r:.40}")
    total = sum(storage.bytes for storage in storages.values())
    if total > room:
        raise WeightsError(f"cut short or damaged: its tensors take {total} bytes")
    return storages


def _arrays(tensors: dict[str, Tensor], buffers: Mapping[str, Any]) -> dict[str, np.ndarray]:
    missing = [
        name
        for name, (storage, *_) in tensors.items()
        if len(buffers.get(storage.key, b"")) < storage.bytes
    ]
    if missing:
        raise WeightsError(
            f"cut short: {len(missing)} of {len(tensors)} parameters are missing:\n  "
            + "\n  ".join(shortened(missing))
        )
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    if total > limits.MAX_BYTES:
        raise WeightsError(f"its tensors take {total} bytes; at most {limits.MAX_BYTES}")
    return {name: _view(name, t, buffers[t.storage.key]) for name, t in tensors.items()}


def _view(name: str, tensor: Tensor, buffer: Any) -> np.ndarray:
    storage, offset, shape, strides = tensor
    limits.checked_shape(shape, storage.dtype)
    if len(shape) != len(strides):
        raise WeightsError(f"{name} has {len(shape)} axes and {len(strides)} strides")
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    inside = min((offset, *strides), default=0) >= 0 and offset + sum(steps) < storage.size
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    if not inside:
        raise WeightsError(f"{name} reaches outside its storage of {storage.size} elements")
    if math.prod(shape) > storage.size:
        raise WeightsError(f"{name} repeats the {storage.size} elements of its storage")
    flat = np.frombuffer(buffer, storage.dtype, count=storage.size)
    if storage.dtype == np.bool_ and (flat.view(np.uint8) > 1).any():
        raise WeightsError(f"{name} has a truth value that is neither 0 nor 1")
    in_bytes = [stride * storage.dtype.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes, writeable=False)
    return view.copy()


def _find(module: str, name: str) -> Any:
    """What a name in a pickle stands for."""
    if (module, name) == ("collections", "OrderedDict"):
        return pickles.Function(pickles.ordered_dict)
    if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return pickles.Function(_rebuild_tensor)
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
        return pickles.Function(_rebuild_parameter)
    if module == "torch" and name in STORAGE_TYPES:
        return StorageType(STORAGE_TYPES[name])
    raise WeightsError(
        f"the pickle asks for {module:.60}.{name:.60}, which is no part of a dict of tensors; it "
        "was not run. Save the model's state_dict() alone, or use a .safetensors file."
    )


def _refer(pid: Any) -> Storage:
    if type(pid) is not tuple or not 5 <= len(pid) <= 6:
        raise WeightsError("the pickle refers to what is not a storage")
    kind, storage_type, key, _, size, *view = pid
    is_storage = kind == "storage" and isinstance(storage_type, StorageType) and not any(view)
    if not (is_storage and type(key) in (str, int) and _is_size(size)):
        raise WeightsError("the pickle refers to what is not a storage")
    return Storage(storage_type.dtype, str(key), size)


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor:
    whole = type(shape) is tuple and type(strides) is tuple
    if not (whole and isinstance(storage, Storage) and len(shape) <= limits.MAX_AXES):
        raise WeightsError("a tensor in the pickle is damaged")
    if not all(map(_is_size, (offset, *shape))):
        raise WeightsError("a tensor in the pickle is damaged")
    if not all(type(stride) is int and abs(stride) < limits.MAX_BYTES for stride in strides):
        raise WeightsError("a tensor in the pickle is damaged")
    return Tensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= limits.MAX_BYTES


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data
