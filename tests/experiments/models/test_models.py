"""Shapes, sizes and the layers that no framework of ours provides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import cifar_resnet, cifar_resnet_nnx
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.efficientnet_lite import EfficientNetLite
from experiments.models.googlenet import GoogLeNet, local_response_norm, max_pool_ceil
from experiments.models.mobilenet import MobileNetV1, MobileNetV2
from experiments.models.resnet import ResNet
from experiments.models.vgg import VGG
from experiments.weights import tree

TORCHVISION = {"stride_on_3x3": True, "use_bias": False}

# Trainable parameters as published: EfficientNet-Lite by the tests of TensorFlow's implementation,
# MobileNet and ResNet by Keras, VGG and the second ResNet figures by torchvision, GoogLeNet by the
# sizes in its Caffe file, ResNet20 by the 0.27 million of the paper.
PUBLISHED = [
    (EfficientNetLite("lite0"), 224, 4_652_008),
    (EfficientNetLite("lite1"), 240, 5_416_680),
    (EfficientNetLite("lite2"), 260, 6_092_072),
    pytest.param(EfficientNetLite("lite3"), 280, 8_197_096, marks=pytest.mark.slow),
    pytest.param(EfficientNetLite("lite4"), 300, 13_006_568, marks=pytest.mark.slow),
    (MobileNetV1(), 224, 4_231_976),
    (MobileNetV2(), 224, 3_504_872),
    (ResNet(50), 224, 25_583_592),
    (ResNet(101), 224, 44_601_832),
    (ResNet(50, **TORCHVISION), 224, 25_557_032),
    pytest.param(ResNet(101, **TORCHVISION), 224, 44_549_160, marks=pytest.mark.slow),
    (VGG(16), 224, 138_357_544),
    (VGG(19), 224, 143_667_240),
    (GoogLeNet(), 224, 6_998_552),
    (CifarResNet(20), 32, 269_722),
    # With a 3x3 stem: 9408 - 1728 fewer than torchvision's, and 990 classes less.
    (ResNet(50, 10, **TORCHVISION, small_images=True), 32, 23_520_842),
    pytest.param(
        ResNet(101, 10, **TORCHVISION, small_images=True), 32, 42_512_970, marks=pytest.mark.slow
    ),
    # The first dense layer sees 512 values and not 25088; 990 classes less.
    (VGG(16, 10), 32, 138_357_544 - (25088 - 512) * 4096 - 990 * 4097),
]


@pytest.mark.parametrize(("model", "size", "count"), PUBLISHED)
def test_parameter_count_is_the_published_one(model, size, count):
    shapes = tree.template(model, size)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(EfficientNetLite, marks=pytest.mark.slow),
        MobileNetV1,
        pytest.param(MobileNetV2, marks=pytest.mark.slow),
        pytest.param(ResNet, marks=pytest.mark.slow),
        VGG,
        GoogLeNet,
        CifarResNet,
    ],
)
def test_training_gives_logits_and_new_statistics_of_the_same_shapes(network):
    model = network(num_classes=7)
    variables = tree.template(model, 64)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def step(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)

    logits, changed = jax.eval_shape(step, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
    before, after = (jax.tree.map(jnp.shape, t.get("batch_stats")) for t in (variables, changed))
    assert before == after


@pytest.mark.slow
def test_small_images_are_not_shrunk_before_the_first_block():
    for model, side in (
        (ResNet(50, small_images=True), 32),
        (ResNet(50), 8),
        (MobileNetV1(stem_stride=1), 32),
        (MobileNetV2(stem_stride=1), 32),
        (EfficientNetLite(stem_stride=1), 32),
        (MobileNetV2(), 16),
    ):
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        first = "block1" if isinstance(model, MobileNetV1) else "block0"
        first = "stage1_block1" if isinstance(model, ResNet) else first
        run = functools.partial(model.apply, capture_intermediates=True, mutable=True)
        _, seen = jax.eval_shape(run, tree.template(model, 32), image)
        (out,) = seen["intermediates"][first]["__call__"]
        assert out.shape[1] == side


@pytest.mark.parametrize(
    "network",
    [EfficientNetLite, MobileNetV1, MobileNetV2, ResNet, VGG, GoogLeNet, CifarResNet],
)
def test_every_layer_but_the_classifier_computes_in_the_given_type(network):
    model = network(dtype=jnp.bfloat16)
    run = functools.partial(model.apply, capture_intermediates=True, mutable=True)
    variables = tree.template(model, 64)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits, seen = jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert logits.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(seen["intermediates"]):
        names = [key.key for key in path if hasattr(key, "key")]
        # The BatchNorms compute in float32, and the unit that has them casts what they give.
        is_float32 = names[0] in ("classifier", "__call__") or names[-2] == "bn"
        assert leaf.dtype == (jnp.float32 if is_float32 else jnp.bfloat16), names


@pytest.mark.parametrize("size", [5, 6, 7, 8])
def test_max_pool_ceil_covers_the_edge(size, rng):
    x = rng.normal(size=(1, size, size, 2)).astype(np.float32)
    pooled = max_pool_ceil(jnp.asarray(x))
    count = int(np.ceil((size - 3) / 2)) + 1  # Caffe's rule
    assert pooled.shape == (1, count, count, 2)
    for i in range(count):
        for j in range(count):
            window = x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            np.testing.assert_array_equal(pooled[0, i, j], window.max(axis=(0, 1)))


def test_local_response_norm_is_its_definition(rng):
    x = rng.normal(size=(2, 3, 3, 7)).astype(np.float32) * 50
    expected = np.empty_like(x)
    for c in range(7):
        around = x[..., max(0, c - 2) : c + 3].astype(np.float64)
        scale = 1 + 1e-4 / 5 * np.sum(around**2, axis=-1)
        expected[..., c] = x[..., c] / scale**0.75
    np.testing.assert_allclose(local_response_norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_the_shortcut_of_type_a_takes_every_second_pixel_and_adds_zeros():
    x = jnp.arange(2 * 4 * 4 * 4, dtype=jnp.float32).reshape(2, 4, 4, 4)
    shortcut = cifar_resnet.subsample(x, 8, 2)
    assert shortcut.shape == (2, 2, 2, 8)
    np.testing.assert_array_equal(shortcut[..., 2:6], x[:, ::2, ::2])
    np.testing.assert_array_equal(shortcut[..., [0, 1, 6, 7]], 0)


def test_the_nnx_twin_computes_the_same(rng):
    model = CifarResNet(depth=8)
    variables = jax.tree.map(
        lambda leaf: rng.random(leaf.shape, np.float32) - np.float32(0.3), tree.template(model, 16)
    )
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    twin = cifar_resnet_nnx.from_linen(variables, depth=8)
    graph, state = nnx.split(twin)
    images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(variables, images)
    logits = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images)
    np.testing.assert_array_equal(logits, expected)
    assert np.abs(expected).max() > 0
