import jax
import jax.numpy as jnp
import pytest

from experiments import zoo
from experiments.models.efficientnet_lite import EfficientNetLite
from experiments.weights import names, tree

# Asserted by the tests of TensorFlow's own implementation.
PUBLISHED = {
    "lite0": 4_652_008,
    "lite1": 5_416_680,
    "lite2": 6_092_072,
    "lite3": 8_197_096,
    "lite4": 13_006_568,
}


@pytest.mark.parametrize(("variant", "count"), PUBLISHED.items())
def test_parameter_count_is_the_published_one(variant, count):
    shapes = tree.template(EfficientNetLite(variant), 64)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def test_logits_and_running_statistics_have_the_expected_shapes():
    model = EfficientNetLite(num_classes=7)
    variables = tree.template(model, 64)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    logits, changed = jax.eval_shape(
        lambda v, x: model.apply(
            v, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        ),
        variables,
        images,
    )
    assert logits.shape == (2, 7)
    assert jax.tree.structure(changed["batch_stats"]) == jax.tree.structure(
        variables["batch_stats"]
    )


@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_layer_has_one_name_in_each_layout(variant):
    shapes = tree.template(EfficientNetLite(variant), 64)
    layers = {
        "/".join(key.key for key in path[1:-1])
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
    }
    for layout in (names.efficientnet_pytorch, names.efficientnet_timm(variant)):
        assert len({layout(layer) for layer in layers}) == len(layers)
    timm = names.efficientnet_timm(variant)
    assert timm("block0/project/bn") == "blocks.0.0.bn2"
    assert timm("block1/project/conv") == "blocks.1.0.conv_pwl"


@pytest.mark.network
def test_the_package_fills_the_model():
    _, variables = zoo.load("efficientnet_lite0")
    assert variables["params"]["classifier"]["bias"][0] == pytest.approx(0.0320539)
