"""safetensors and npz; the other formats have files of their own."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from experiments.weights import formats
from experiments.weights.tree import WeightsError

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2),
    "fc.bias": np.array([1.5, -2], ml_dtypes.bfloat16),
    "bn.num_batches_tracked": np.array(7, np.int64),
}
NAMES = {"float32": "F32", "bfloat16": "BF16", "int64": "I64"}


def safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        dtype = NAMES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_safetensors_gives_the_arrays_back(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(safetensors(ARRAYS))
    read = formats.read(tmp_path / "m.safetensors")
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_a_truncated_safetensors_names_what_it_lacks(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(safetensors(ARRAYS)[:-9])
    with pytest.raises(WeightsError, match=r"2 of 3 parameters are missing:\n  fc\.bias"):
        formats.read(tmp_path / "m.safetensors")


def test_every_truncation_is_an_error(tmp_path):
    whole = safetensors(ARRAYS)
    for length in range(len(whole)):
        (tmp_path / "m.safetensors").write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            formats.read(tmp_path / "m.safetensors")


@pytest.mark.parametrize("offsets", [[0, 95], [-96, 0], [8, 0], [0, 1000]])
def test_offsets_that_do_not_fit_are_refused(tmp_path, offsets):
    header = {"w": {"dtype": "F32", "shape": [24], "data_offsets": offsets}}
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(96))
    with pytest.raises(WeightsError, match="1 of 1 parameters"):
        formats.read(tmp_path / "m.safetensors")


def test_npz_is_read_without_pickles(tmp_path):
    np.savez(tmp_path / "m.npz", weight=ARRAYS["conv.weight"])
    np.testing.assert_array_equal(formats.read(tmp_path / "m.npz")["weight"], ARRAYS["conv.weight"])
    np.savez(tmp_path / "bad.npz", weight=np.array([print], dtype=object))
    with pytest.raises(WeightsError, match=r"bad\.npz"):
        formats.read(tmp_path / "bad.npz")
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:100])
    with pytest.raises(WeightsError, match="cut short"):
        formats.read(tmp_path / "cut.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_truncation_of_an_npz_is_an_error_and_keeps_what_is_whole(tmp_path, save):
    weight = ARRAYS["conv.weight"]
    save(tmp_path / "m.npz", weight=weight, other=weight, objects=np.array([print], dtype=object))
    whole = (tmp_path / "m.npz").read_bytes()
    kept = set()
    for length in range(len(whole)):
        (tmp_path / "m.npz").write_bytes(whole[:length])
        with pytest.raises(WeightsError) as error:
            formats.read(tmp_path / "m.npz")
        arrays = getattr(error.value, "arrays", {})
        for array in arrays.values():
            np.testing.assert_array_equal(array, weight)
        kept.add(tuple(arrays))
    assert kept == {(), ("weight",), ("weight", "other")}


def test_a_file_that_is_not_there_or_has_another_suffix(tmp_path):
    with pytest.raises(WeightsError, match="no such weight file"):
        formats.read(tmp_path / "m.npz")
    (tmp_path / "m.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"none of \.pth"):
        formats.read(tmp_path / "m.bin")
