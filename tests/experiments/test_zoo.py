import jax
import numpy as np
import pytest

from experiments import zoo
from experiments.weights import tree


@pytest.mark.parametrize(
    "name", ["efficientnet_lite4", "mobilenet_v1", "mobilenet_v2", "googlenet", "resnet50"]
)
def test_every_layer_has_a_name_of_its_own_in_the_file(name):
    entry = zoo.find(name)
    shapes = tree.template(entry.module(), entry.preprocessing.size)
    layers = {"/".join(key.key for key in path[1:-1]) for path, _ in leaves(shapes)}
    for naming in entry.namings:
        assert len({naming.layer(layer) for layer in layers}) == len(layers)


def leaves(shapes):
    return jax.tree_util.tree_leaves_with_path(shapes)


def test_a_weight_file_is_loaded_into_the_network(tmp_path, rng):
    entry = zoo.find("cifar10_resnet20")
    (naming,) = entry.namings
    shapes = tree.template(entry.module(), 32)
    arrays = {}
    for path, leaf in leaves(shapes):
        in_torch = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
        (name,) = naming.candidates(path)
        arrays[name] = rng.normal(size=leaf.shape).astype(np.float32).transpose(in_torch)
    np.savez(tmp_path / "w.npz", **arrays)
    _, variables = zoo.load("cifar10_resnet20", str(tmp_path / "w.npz"))
    kernel = variables["params"]["stage2_block1"]["conv1"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, arrays["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))

    del arrays["layer3.2.bn2.running_var"]
    np.savez(tmp_path / "w.npz", **arrays)
    with pytest.raises(tree.WeightsError, match=r"w\.npz.*\n.*stage3_block3/conv2/bn/var: missing"):
        zoo.load("cifar10_resnet20", str(tmp_path / "w.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_truncated_archive_names_what_it_lacks(tmp_path, save):
    shapes = tree.template(zoo.find("cifar10_resnet20").module(), 32)
    flat = {
        "/".join(key.key for key in path[1:]): leaf
        for path, leaf in leaves(tree.random_variables(shapes))
    }
    save(tmp_path / "w.npz", **flat)
    assert zoo.load("cifar10_resnet20", str(tmp_path / "w.npz"))
    whole = (tmp_path / "w.npz").read_bytes()
    *_, before, last = flat
    (tmp_path / "w.npz").write_bytes(whole[: whole.index(f"{last}.npy".encode()) + 50])
    with pytest.raises(tree.WeightsError, match=r"cut short: .* \(1 problems\)") as error:
        zoo.load("cifar10_resnet20", str(tmp_path / "w.npz"))
    assert f"{last}: missing" in str(error.value)
    assert before not in str(error.value)
    (tmp_path / "w.npz").write_bytes(whole[:-1])
    with pytest.raises(tree.WeightsError, match=r"w\.npz: cut short$"):
        zoo.load("cifar10_resnet20", str(tmp_path / "w.npz"))


def test_a_truncated_hdf5_names_what_it_lacks(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["conv1/conv1/kernel:0"] = np.zeros((7, 7, 3, 64), np.float32)
    whole = (tmp_path / "w.h5").read_bytes()
    (tmp_path / "w.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(tree.WeightsError, match=r"which is cut short: (.|\n)* missing"):
        zoo.load("vgg16", str(tmp_path / "w.h5"))


def test_a_network_without_a_package_asks_for_a_file():
    with pytest.raises(tree.WeightsError, match=r"vgg16: no package .*--config\.weights=FILE"):
        zoo.load("vgg16")


def test_weights_for_other_classes_and_another_size_are_loaded(tmp_path):
    module = zoo.build("vgg16_torchvision", num_classes=3)
    variables = tree.random_variables(tree.template(module, 32))
    arrays = {"/".join(k.key for k in path[1:]): leaf for path, leaf in leaves(variables)}
    np.savez(tmp_path / "w.npz", **arrays)
    loaded_module, loaded = zoo.load(
        "vgg16_torchvision", str(tmp_path / "w.npz"), num_classes=3, image_size=32
    )
    assert loaded_module.num_classes == 3
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    with pytest.raises(tree.WeightsError, match=r"fc1/kernel: shape \(25088, 4096\) expected"):
        zoo.load("vgg16_torchvision", str(tmp_path / "w.npz"), num_classes=3)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'efficientnet_lite0'"):
        zoo.find("efficientnet-lite0")


@pytest.mark.network
@pytest.mark.parametrize("name", [name for name, entry in zoo.MODELS.items() if entry.package])
def test_the_package_fills_the_network(name):
    _, variables = zoo.load(name)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
