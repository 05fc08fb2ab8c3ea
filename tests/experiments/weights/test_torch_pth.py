"""Checkpoints are written here by hand, as PyTorch writes them, and read back."""

import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from experiments.weights.torch_pth import MAGIC_NUMBER, PROTOCOL_VERSION, read_pth
from experiments.weights.tree import WeightsError

STORAGES = {"float32": "FloatStorage", "int64": "LongStorage", "float16": "HalfStorage"}


class FakeTensor:
    """An array that pickles the way a tensor does."""

    def __init__(self, key: str, array: np.ndarray) -> None:
        self.key, self.array = key, array

    def __reduce__(self):
        strides = tuple(s // self.array.itemsize for s in self.array.strides)
        arguments = (self, 0, self.array.shape, strides, False, OrderedDict())
        return sys.modules["torch._utils"]._rebuild_tensor_v2, arguments


class FakePickler(pickle.Pickler):
    """Refers to the storage of a tensor by a persistent id, the first argument of its rebuild."""

    def __init__(self, file) -> None:
        super().__init__(file, protocol=2)
        self.inside: set[str] = set()

    def persistent_id(self, obj):
        if not isinstance(obj, FakeTensor) or obj.key not in self.inside:
            if isinstance(obj, FakeTensor):
                self.inside.add(obj.key)
            return None
        storage = getattr(sys.modules["torch"], STORAGES[obj.array.dtype.name])
        return ("storage", storage, obj.key, "cpu", obj.array.size)


@pytest.fixture
def fake_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importable names that a pickle can refer to; PyTorch need not be installed."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("the reader must not call PyTorch")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def pickled(value) -> bytes:
    file = io.BytesIO()
    FakePickler(file).dump(value)
    return file.getvalue()


def write_stream(path: Path, state: dict, tensors: list[FakeTensor]) -> None:
    machine = {"protocol_version": PROTOCOL_VERSION, "little_endian": True}
    keys = [tensor.key for tensor in tensors]
    with path.open("wb") as file:
        for value in (MAGIC_NUMBER, PROTOCOL_VERSION, machine, state, keys):
            file.write(pickled(value))
        for tensor in tensors:
            file.write(struct.pack("<q", tensor.array.size))
            file.write(tensor.array.tobytes(order="A"))


def write_zip(path: Path, state: dict, tensors: list[FakeTensor]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled(state))
        archive.writestr("model/byteorder", "little")
        for tensor in tensors:
            archive.writestr(f"model/data/{tensor.key}", tensor.array.tobytes(order="A"))


WRITERS = pytest.mark.parametrize("write", [write_stream, write_zip])


@pytest.fixture
def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        "conv.weight": rng.normal(size=(4, 3, 2, 2)).astype(np.float32),
        "fc.weight": rng.normal(size=(5, 3)).astype(np.float32).T,  # strides (1, 3)
        "fc.bias": rng.normal(size=(5,)).astype(np.float16),
        "bn.num_batches_tracked": np.array(7, np.int64),
    }


def fake(arrays: dict[str, np.ndarray]) -> tuple[dict, list[FakeTensor]]:
    tensors = [FakeTensor(str(i), array) for i, array in enumerate(arrays.values())]
    return OrderedDict(zip(arrays, tensors)), tensors


@WRITERS
@pytest.mark.usefixtures("fake_torch")
def test_both_containers_give_the_arrays_back(tmp_path, arrays, write):
    write(tmp_path / "m.pth", *fake(arrays))
    read = read_pth(tmp_path / "m.pth")
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.usefixtures("fake_torch")
def test_a_nested_state_dict_and_data_parallel_names_are_understood(tmp_path, arrays):
    state, tensors = fake(arrays)
    wrapped = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    write_zip(tmp_path / "m.pth", wrapped, tensors)
    assert list(read_pth(tmp_path / "m.pth")) == list(arrays)


@WRITERS
@pytest.mark.usefixtures("fake_torch")
def test_a_pickle_that_runs_code_is_refused(tmp_path, write):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    write(tmp_path / "m.pth", {"conv.weight": Attack()}, [])
    with pytest.raises(WeightsError, match=r"asks for \w+\.mkdir.*was not run"):
        read_pth(tmp_path / "m.pth")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.usefixtures("fake_torch")
def test_the_first_pickles_of_a_stream_are_restricted_too(tmp_path):
    (tmp_path / "m.pth").write_bytes(pickled(print))
    with pytest.raises(WeightsError, match=r"asks for \w+\.print"):
        read_pth(tmp_path / "m.pth")


@pytest.mark.usefixtures("fake_torch")
def test_a_truncated_stream_names_what_it_lacks(tmp_path, arrays):
    write_stream(tmp_path / "m.pth", *fake(arrays))
    whole = (tmp_path / "m.pth").read_bytes()
    lost = arrays["fc.bias"].nbytes + 8 + arrays["bn.num_batches_tracked"].nbytes
    (tmp_path / "cut.pth").write_bytes(whole[: -lost - 1])
    with pytest.raises(WeightsError, match=r"2 of 4 parameters are missing:\n  fc\.bias\n  bn"):
        read_pth(tmp_path / "cut.pth")


@pytest.mark.usefixtures("fake_torch")
@pytest.mark.parametrize(("cut", "lost"), [("fc.weight", 3), ("fc.bias", 2), (None, 0)])
def test_a_truncated_zip_names_what_it_lacks(tmp_path, arrays, cut, lost):
    write_zip(tmp_path / "m.pth", *fake(arrays))
    whole = (tmp_path / "m.pth").read_bytes()
    end = whole.index(arrays[cut].tobytes(order="A")) + 5 if cut else whole.index(b"PK\x01\x02")
    (tmp_path / "cut.pth").write_bytes(whole[:end])
    names = "\n  ".join(list(arrays)[-lost:])
    expected = f"{lost} of 4 parameters are missing:\n  {names}" if cut else "the last parameter"
    with pytest.raises(WeightsError, match=rf"cut short.*{expected}"):
        read_pth(tmp_path / "cut.pth")


@WRITERS
@pytest.mark.usefixtures("fake_torch")
def test_every_truncation_is_an_error(tmp_path, arrays, write):
    write(tmp_path / "m.pth", *fake(arrays))
    whole = (tmp_path / "m.pth").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            read_pth(tmp_path / "cut.pth")


@pytest.mark.usefixtures("fake_torch")
def test_a_tensor_cannot_reach_outside_its_storage(tmp_path, arrays):
    state, tensors = fake({"fc.weight": arrays["conv.weight"]})
    real = tensors[0].array
    tensors[0].array = np.lib.stride_tricks.as_strided(real, real.shape, (4000, 400, 40, 4))
    payload = pickled(state)
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("model/data.pkl", payload)
        archive.writestr("model/data/0", real.tobytes())
    with pytest.raises(WeightsError, match=r"fc\.weight reaches outside its storage"):
        read_pth(tmp_path / "m.pth")


@pytest.mark.parametrize(
    "contents", [b"", b"not a checkpoint", b"PK\x03\x04 nor this", b"\x80\x02."]
)
def test_other_files_are_refused(tmp_path, contents):
    (tmp_path / "m.pth").write_bytes(contents)
    with pytest.raises(WeightsError, match=r"m\.pth"):
        read_pth(tmp_path / "m.pth")


def write_parts(path: Path, payload: bytes, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("model/data.pkl", payload)
        archive.writestr("model/data/0", data)


@pytest.mark.usefixtures("fake_torch")
@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ((1000, 1000), (0, 0), "repeats the 24 elements"),
        ((2**40,), (0,), "tensor in the pickle is damaged"),
        ((5, 5), (1, 1), "repeats the 24 elements"),
        ((2**31, 2**31, 0), (0, 0, 0), "too large"),
        ((2, 3), (1,), "2 axes and 1 strides"),
        ((2,), (-1,), "reaches outside"),
    ],
)
def test_a_view_has_no_more_elements_than_its_storage(tmp_path, shape, strides, message):
    state, (tensor,) = fake({"fc.weight": np.zeros((4, 6), np.float32)})
    array = tensor.array

    class Lying:
        itemsize, dtype, size = 4, array.dtype, array.size

    Lying.shape, Lying.strides = shape, tuple(4 * stride for stride in strides)
    tensor.array = Lying
    write_parts(tmp_path / "m.pth", pickled(state), array.tobytes())
    with pytest.raises(WeightsError, match=message):
        read_pth(tmp_path / "m.pth")


@pytest.mark.usefixtures("fake_torch")
def test_what_unpacks_to_more_than_the_file_is_refused(tmp_path):
    """Three GiB of zeros take three MB when they are compressed."""
    array = np.zeros(2**20, np.float32)
    state, _ = fake({"w": array})
    write_parts(tmp_path / "m.pth", pickled(state), array.tobytes(), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="compressed"):
        read_pth(tmp_path / "m.pth")
    write_parts(tmp_path / "n.pth", pickled(state), array.tobytes()[:1000])
    with pytest.raises(WeightsError, match="its tensors take 4194304 bytes"):
        read_pth(tmp_path / "n.pth")
