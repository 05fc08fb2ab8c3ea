"""Files are written here as TensorFlow.js and Keras write them."""

import json
import re
import sys

import numpy as np
import pytest

from experiments.weights.keras import read_h5, read_tfjs
from experiments.weights.tree import WeightsError
from jaxquant.extras import how_to_install


@pytest.fixture
def kernel(rng) -> np.ndarray:
    return rng.normal(size=(3, 3, 2, 4)).astype(np.float32)


def write_tfjs(folder, groups: list[tuple[dict[str, bytes], list[dict]]]):
    manifest = []
    for files, weights in groups:
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
        manifest.append({"paths": list(files), "weights": weights})
    path = folder / "model.json"
    path.write_text(json.dumps({"modelTopology": {}, "weightsManifest": manifest}))
    return path


def entry(name: str, array: np.ndarray, **more) -> dict:
    return {"name": name, "shape": list(array.shape), "dtype": "float32", **more}


def test_weights_go_on_across_shards_and_groups(tmp_path, kernel):
    bias = np.float32([1, 2, 3, 4])
    data = kernel.tobytes() + bias.tobytes()
    first = ({"a": data[:100], "b": data[100:]}, [entry("c/kernel", kernel), entry("c/bias", bias)])
    second = ({"c": bias.tobytes()}, [entry("bn/gamma", bias)])
    arrays = read_tfjs(write_tfjs(tmp_path, [first, second]))
    assert list(arrays) == ["c/kernel", "c/bias", "bn/gamma"]
    np.testing.assert_array_equal(arrays["c/kernel"], kernel)
    np.testing.assert_array_equal(arrays["bn/gamma"], bias)


def test_weights_of_fewer_bits_become_float32(tmp_path):
    stored, half = np.uint8([0, 128, 255]), np.float16([1.5, -2])
    weights = [
        entry("a/kernel", stored, quantization={"dtype": "uint8", "scale": 0.5, "min": -3.0}),
        entry("a/bias", half, quantization={"dtype": "float16", "original_dtype": "float32"}),
    ]
    path = write_tfjs(tmp_path, [({"a": stored.tobytes() + half.tobytes()}, weights)])
    arrays = read_tfjs(path)
    np.testing.assert_array_equal(arrays["a/kernel"], np.float32([-3, 61, 124.5]))
    np.testing.assert_array_equal(arrays["a/bias"], np.float32([1.5, -2]))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("lost", ["short", "absent"])
def test_a_lost_shard_names_the_weights(tmp_path, kernel, lost):
    path = write_tfjs(
        tmp_path,
        [
            ({"a": kernel.tobytes()}, [entry("conv1/kernel", kernel)]),
            ({"b": kernel.tobytes()}, [entry("conv2/kernel", kernel)]),
        ],
    )
    (tmp_path / "b").write_bytes(b"1234") if lost == "short" else (tmp_path / "b").unlink()
    with pytest.raises(WeightsError, match=r"without 1 weights:\n  conv2/kernel"):
        read_tfjs(path)


def test_a_shard_outside_the_folder_is_refused(tmp_path, kernel):
    path = write_tfjs(tmp_path, [({}, [])])
    path.write_text(
        json.dumps({"weightsManifest": [{"paths": ["../secret"], "weights": []}]}),
    )
    with pytest.raises(WeightsError, match=r"'\.\./secret' leads out"):
        read_tfjs(path)


@pytest.mark.parametrize("text", ["", "[]", '{"weightsManifest": [{}]}'])
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.json: not a TensorFlow\.js"):
        read_tfjs(tmp_path / "model.json")


def test_hdf5_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(WeightsError, match=re.escape(how_to_install("hdf5"))):
        read_h5(tmp_path / "m.h5")


@pytest.mark.parametrize("root", ["", "model_weights/"])
def test_the_older_hdf5_layout(tmp_path, kernel, root):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file[f"{root}conv1/model/conv1/kernel:0"] = kernel
        file[f"{root}conv1/model/conv1/bias:0"] = kernel[0, 0, 0]
        file[root or "/"].attrs["layer_names"] = ["conv1"]
    arrays = read_h5(tmp_path / "m.h5")
    assert set(arrays) == {"conv1/kernel", "conv1/bias"}
    np.testing.assert_array_equal(arrays["conv1/kernel"], kernel)


def test_the_names_of_keras_1_in_which_vgg_is_published(tmp_path, kernel):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["block1_conv1/block1_conv1_W_1:0"] = kernel
        file["block1_conv1/block1_conv1_b_1:0"] = kernel[0, 0, 0]
        file["fc1/fc1_W:0"] = kernel[0, 0]
        file.create_group("block1_pool")  # a layer without weights
    arrays = read_h5(tmp_path / "m.h5")
    assert set(arrays) == {"block1_conv1/kernel", "block1_conv1/bias", "fc1/kernel"}
    np.testing.assert_array_equal(arrays["block1_conv1/kernel"], kernel)


def test_the_hdf5_layout_of_keras_3(tmp_path, kernel):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/conv2d_1/vars/0"] = kernel
        file["layers/conv2d_1/vars"].attrs["name"] = "stem"
        for i in range(4):
            file[f"layers/batch_normalization/vars/{i}"] = np.full(3, i, np.float32)
        file["layers/batch_normalization/vars"].attrs["name"] = "stem_bn"
        file["optimizer/vars/0"] = np.int64(7)
    arrays = read_h5(tmp_path / "m.weights.h5")
    assert set(arrays) == {
        "stem/kernel",
        "stem_bn/gamma",
        "stem_bn/beta",
        "stem_bn/moving_mean",
        "stem_bn/moving_variance",
    }
    assert arrays["stem_bn/moving_variance"][0] == 3


def test_keras_3_without_layer_names_is_explained(tmp_path, kernel):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        file["layers/conv2d_1/vars/0"] = kernel
    with pytest.raises(WeightsError, match="with a newer Keras 3"):
        read_h5(tmp_path / "m.weights.h5")


def test_a_truncated_hdf5_is_refused(tmp_path, kernel):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        file["conv1/conv1/kernel:0"] = kernel
    whole = (tmp_path / "m.h5").read_bytes()
    (tmp_path / "m.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="cut short"):
        read_h5(tmp_path / "m.h5")
