"""Reads PyTorch checkpoints (`.pth`) without PyTorch and without an open pickle.

Both containers are read: the zip archive of PyTorch 1.6 and later, and the stream of pickles before
it. A pickle may name any callable of the machine, so the unpickler here resolves the few names that
a dict of tensors consists of, to functions of this file, and refuses every other name.
"""

import collections
import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from experiments.weights.tree import WeightsError, shortened

# The old container opens with three pickles: this number, the protocol and facts of the machine.
MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
ZIP_SIGNATURE = b"PK\x03\x04"
HEADER_SIZE = 30  # of a file in a zip archive; it ends with the lengths of the name and of extras


class StorageType(NamedTuple):
    """The element type of a flat buffer, little-endian."""

    dtype: np.dtype


class Storage(NamedTuple):
    """A flat buffer that tensors are views of."""

    dtype: np.dtype
    key: str
    size: int  # in elements


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
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _read_zip(file)
            file.seek(0)
            if file.read(len(ZIP_SIGNATURE)) == ZIP_SIGNATURE:
                return _read_cut_zip(file)
            file.seek(0)
            return _read_stream(file)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (EOFError, struct.error, zipfile.BadZipFile, OverflowError, MemoryError) as error:
        raise WeightsError(f"{path}: cut short or damaged: {error}") from error
    except (pickle.UnpicklingError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: not a PyTorch checkpoint: {error}") from error


def _read_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        pickles = [n for n in names if n.endswith("/data.pkl") and n.count("/") == 1]
        if len(pickles) != 1:
            raise WeightsError("a zip archive without a checkpoint's data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise WeightsError("big-endian checkpoints are not supported")
        with archive.open(pickles[0]) as stream:
            tensors = _state_dict(_RestrictedUnpickler(stream).load())
        members = {key: f"{root}data/{key}" for key in _storages(tensors)}
        buffers = {k: archive.read(name) for k, name in members.items() if name in names}
    return _arrays(tensors, buffers)


def _read_cut_zip(file: BinaryIO) -> dict[str, np.ndarray]:
    """Raises an error that names what is lost: the directory of the archive is, at its end."""
    file.seek(0)
    contents = file.read()

    def data(name: bytes) -> bytes:
        """From the start of a file in the archive to the end of what is there."""
        place = -1
        while (place := contents.find(name, place + 1)) >= 0:
            header = contents[max(place - HEADER_SIZE, 0) : place]
            if len(header) == HEADER_SIZE and header.startswith(ZIP_SIGNATURE):
                name_length, extra_length = struct.unpack("<2H", header[-4:])
                if name_length == len(name):
                    return contents[place + name_length + extra_length :]
        return b""

    (name_length,) = struct.unpack_from("<H", contents, HEADER_SIZE - 4)
    root = contents[HEADER_SIZE:][:name_length].partition(b"/")[0]
    tensors = _state_dict(_RestrictedUnpickler(io.BytesIO(data(root + b"/data.pkl"))).load())
    _arrays(tensors, {key: data(root + b"/data/" + key.encode()) for key in _storages(tensors)})
    raise WeightsError("cut short behind the last parameter")


def _read_stream(file: BinaryIO) -> dict[str, np.ndarray]:
    opening = tuple(_RestrictedUnpickler(file).load() for _ in range(2))
    if opening != (MAGIC_NUMBER, PROTOCOL_VERSION):
        raise WeightsError(f"not a PyTorch checkpoint: it opens with {opening!r:.80}")
    machine = _RestrictedUnpickler(file).load()
    if not machine.get("little_endian", True):
        raise WeightsError("big-endian checkpoints are not supported")
    tensors = _state_dict(_RestrictedUnpickler(file).load())
    storages = _storages(tensors)
    buffers = {}
    for key in _RestrictedUnpickler(file).load():
        header = file.read(8)
        if len(header) < 8:
            break
        (size,) = struct.unpack("<q", header)
        if key not in storages or size != storages[key].size:
            raise WeightsError(f"storage {key!r} has {size} elements, unlike its tensors")
        buffers[key] = file.read(size * storages[key].dtype.itemsize)
    return _arrays(tensors, buffers)


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


def _storages(tensors: dict[str, Tensor]) -> dict[str, Storage]:
    return {tensor.storage.key: tensor.storage for tensor in tensors.values()}


def _arrays(tensors: dict[str, Tensor], buffers: dict[str, bytes]) -> dict[str, np.ndarray]:
    missing = [
        name
        for name, (storage, *_) in tensors.items()
        if len(buffers.get(storage.key, b"")) < storage.size * storage.dtype.itemsize
    ]
    if missing:
        raise WeightsError(
            f"cut short: {len(missing)} of {len(tensors)} parameters are missing:\n  "
            + "\n  ".join(shortened(missing))
        )
    return {name: _view(name, t, buffers[t.storage.key]) for name, t in tensors.items()}


def _view(name: str, tensor: Tensor, buffer: bytes) -> np.ndarray:
    storage, offset, shape, strides = tensor
    steps = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
    inside = min((offset, *shape, *strides)) >= 0 and offset + sum(steps) < storage.size
    if 0 not in shape and not inside:
        raise WeightsError(f"{name} reaches outside its storage of {storage.size} elements")
    flat = np.frombuffer(buffer, storage.dtype, count=storage.size)
    in_bytes = [stride * storage.dtype.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes).copy()


class _RestrictedUnpickler(pickle.Unpickler):
    """Loads dicts of tensors, and refuses a pickle that asks for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGE_TYPES:
            return StorageType(STORAGE_TYPES[name])
        raise WeightsError(
            f"the pickle asks for {module}.{name}, which is no part of a dict of tensors; it was "
            "not run. Save the model's state_dict() alone, or use a .safetensors file."
        )

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _, size, *view = pid
        if kind != "storage" or not isinstance(storage_type, StorageType) or any(view):
            raise WeightsError(f"the pickle refers to {pid!r:.80}, which is not a storage")
        return Storage(storage_type.dtype, str(key), int(size))


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor:
    return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data
