import flax.linen as nn
import jax
import numpy as np
import pytest

from experiments.models.layers import ConvBN
from experiments.weights import tree

SHAPES = tree.template(ConvBN(6, 3, use_bias=True), 8)
SAME_NAMES = tree.Naming(lambda layer: layer, tree.TORCH)
DEPTHWISE = tree.template(ConvBN(3, 3, depthwise=True), 8)


def torch_file(rng: np.random.Generator) -> dict[str, np.ndarray]:
    vectors = ("conv.bias", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return {
        "conv.weight": rng.normal(size=(6, 3, 3, 3)),
        **{name: rng.normal(size=6) for name in vectors},
        "bn.num_batches_tracked": np.array(1),
    }


def assemble_torch(source):
    return tree.assemble(SHAPES, source, SAME_NAMES)


def test_torch_arrays_land_in_flax_order(rng):
    source = torch_file(rng)
    variables = assemble_torch(source)
    kernel = variables["params"]["conv"]["kernel"]
    assert kernel.dtype == np.float32
    expected = source["conv.weight"][5, 2, 0, 1].astype(np.float32)
    assert kernel[0, 1, 2, 5] == expected
    np.testing.assert_array_equal(
        variables["batch_stats"]["bn"]["var"], source["bn.running_var"].astype(np.float32)
    )
    assert jax.tree.structure(variables) == jax.tree.structure(SHAPES)


def test_a_keras_depthwise_kernel_becomes_a_grouped_one(rng):
    kernel = rng.normal(size=(3, 3, 3, 1)).astype(np.float32)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    source = {"conv/depthwise_kernel": kernel} | {f"bn/{n}": np.ones(3) for n in names}
    variables = tree.assemble(DEPTHWISE, source, tree.Naming(lambda layer: layer, tree.KERAS))
    np.testing.assert_array_equal(variables["params"]["conv"]["kernel"], kernel.swapaxes(2, 3))


def test_missing_parameters_are_named(rng):
    source = torch_file(rng)
    del source["conv.weight"], source["bn.running_var"]
    with pytest.raises(tree.WeightsError, match=r"2 problems") as error:
        assemble_torch(source)
    assert "conv/kernel: missing (looked for conv.weight)" in str(error.value)
    assert "bn/var: missing" in str(error.value)


def test_another_shape_is_named(rng):
    source = torch_file(rng) | {"conv.weight": np.zeros((6, 3, 5, 5))}
    expected = r"conv/kernel: shape \(3, 3, 3, 6\) expected, conv.weight gives \(5, 5, 3, 6\)"
    with pytest.raises(tree.WeightsError, match=expected):
        assemble_torch(source)


def test_arrays_without_a_place_are_named(rng):
    source = torch_file(rng) | {"layer4.conv.weight": np.zeros((6, 3, 3, 3))}
    with pytest.raises(tree.WeightsError, match=r"layer4\.conv\.weight: the model has no such"):
        assemble_torch(source)


def test_many_problems_are_counted():
    model = nn.Sequential([nn.Dense(2) for _ in range(20)])
    with pytest.raises(tree.WeightsError, match=r"\(40 problems\)(.|\n)*and 32 more"):
        tree.assemble(tree.template(model, 4), {}, SAME_NAMES)


def test_the_naming_that_finds_most_is_taken(rng):
    other = tree.Naming(lambda layer: f"features.{layer}", tree.TORCH)
    assert tree.best_naming(SHAPES, torch_file(rng), (other, SAME_NAMES)) is SAME_NAMES
