"""Files with the names and shapes that the frameworks give them, built here layer by layer.

Each generator below is written from the framework's own definition of the network, in its order,
and knows nothing of our modules.
"""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from experiments import zoo
from experiments.weights import names, tree

Entry = tuple[str, tuple[int, ...]]


def torch_bn(name: str, features: int) -> Iterator[Entry]:
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{leaf}", (features,)
    yield f"{name}.num_batches_tracked", ()


def torch_dense(name: str, inputs: int, outputs: int) -> Iterator[Entry]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def resnet_torchvision(repeats: tuple[int, ...]) -> Iterator[Entry]:
    yield "conv1.weight", (64, 3, 7, 7)
    yield from torch_bn("bn1", 64)
    inputs = 64
    for stage, (count, width) in enumerate(zip(repeats, (64, 128, 256, 512)), start=1):
        for block in range(count):
            root = f"layer{stage}.{block}"
            shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for i, shape in enumerate(shapes, start=1):
                yield f"{root}.conv{i}.weight", shape
                yield from torch_bn(f"{root}.bn{i}", shape[0])
            if block == 0:
                yield f"{root}.downsample.0.weight", (4 * width, inputs, 1, 1)
                yield from torch_bn(f"{root}.downsample.1", 4 * width)
            inputs = 4 * width
    yield from torch_dense("fc", 2048, 1000)


def vgg_torchvision(layers: str) -> Iterator[Entry]:
    """`layers`: a letter for each convolution, by width, and M for each pooling."""
    widths = {"a": 64, "b": 128, "c": 256, "d": 512}
    place, inputs = 0, 3
    for layer in layers:
        if layer == "M":
            place += 1
            continue
        yield f"features.{place}.weight", (widths[layer], inputs, 3, 3)
        yield f"features.{place}.bias", (widths[layer],)
        place, inputs = place + 2, widths[layer]
    yield from torch_dense("classifier.0", 25088, 4096)
    yield from torch_dense("classifier.3", 4096, 4096)
    yield from torch_dense("classifier.6", 4096, 1000)


def vgg_timm(layers: str) -> Iterator[Entry]:
    yield from (entry for entry in vgg_torchvision(layers) if entry[0].startswith("features"))
    for name, shape in (("fc1", (4096, 512, 7, 7)), ("fc2", (4096, 4096, 1, 1))):
        yield f"pre_logits.{name}.weight", shape
        yield f"pre_logits.{name}.bias", shape[:1]
    yield from torch_dense("head.fc", 4096, 1000)


def mobilenet_v2_torchvision() -> Iterator[Entry]:
    yield "features.0.0.weight", (32, 3, 3, 3)
    yield from torch_bn("features.0.1", 32)
    rows = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]
    blocks = [(t, c) for t, c, n in rows for _ in range(n)]
    inputs = 32
    for i, (expansion, features) in enumerate(blocks, start=1):
        root, wide, place = f"features.{i}.conv", inputs * expansion, 0
        if expansion != 1:
            yield f"{root}.0.0.weight", (wide, inputs, 1, 1)
            yield from torch_bn(f"{root}.0.1", wide)
            place = 1
        yield f"{root}.{place}.0.weight", (wide, 1, 3, 3)
        yield from torch_bn(f"{root}.{place}.1", wide)
        yield f"{root}.{place + 1}.weight", (features, wide, 1, 1)
        yield from torch_bn(f"{root}.{place + 2}", features)
        inputs = features
    yield "features.18.0.weight", (1280, 320, 1, 1)
    yield from torch_bn("features.18.1", 1280)
    yield from torch_dense("classifier.1", 1280, 1000)


LITE0 = ((1, 3, 16), (2, 3, 24), (2, 5, 40), (3, 3, 80), (3, 5, 112), (4, 5, 192), (1, 3, 320))
V2 = ((1, 3, 16), (2, 3, 24), (3, 3, 32), (4, 3, 64), (3, 3, 96), (3, 3, 160), (1, 3, 320))


def inverted_timm(rows: tuple[tuple[int, int, int], ...]) -> Iterator[Entry]:
    """timm's `tf_efficientnet_lite0` and `mobilenetv2_100`; (blocks, kernel, features) a stage."""
    yield "conv_stem.weight", (32, 3, 3, 3)
    yield from torch_bn("bn1", 32)
    inputs = 32
    for stage, (count, kernel, features) in enumerate(rows):
        for block in range(count):
            root = f"blocks.{stage}.{block}"
            wide = inputs if stage == 0 else 6 * inputs
            layers = [("conv_dw", (wide, 1, kernel, kernel)), ("conv_pw", (features, wide, 1, 1))]
            if stage > 0:
                layers = [
                    ("conv_pw", (wide, inputs, 1, 1)),
                    layers[0],
                    ("conv_pwl", (features, wide, 1, 1)),
                ]
            for i, (name, shape) in enumerate(layers, start=1):
                yield f"{root}.{name}.weight", shape
                yield from torch_bn(f"{root}.bn{i}", shape[0])
            inputs = features
    yield "conv_head.weight", (1280, 320, 1, 1)
    yield from torch_bn("bn2", 1280)
    yield from torch_dense("classifier", 1280, 1000)


def keras_layer(name: str, kernel: tuple[int, ...]) -> Iterator[Entry]:
    yield f"{name}/kernel", kernel
    yield f"{name}/bias", kernel[-1:]


def keras_bn(name: str, features: int) -> Iterator[Entry]:
    for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
        yield f"{name}/{leaf}", (features,)


def resnet_keras(repeats: tuple[int, ...]) -> Iterator[Entry]:
    yield from keras_layer("conv1_conv", (7, 7, 3, 64))
    yield from keras_bn("conv1_bn", 64)
    inputs = 64
    for stage, (count, width) in enumerate(zip(repeats, (64, 128, 256, 512)), start=2):
        for block in range(1, count + 1):
            root = f"conv{stage}_block{block}"
            kernels = {
                1: (1, 1, inputs, width),
                2: (3, 3, width, width),
                3: (1, 1, width, 4 * width),
            }
            if block == 1:
                kernels[0] = (1, 1, inputs, 4 * width)
            for i, kernel in kernels.items():
                yield from keras_layer(f"{root}_{i}_conv", kernel)
                yield from keras_bn(f"{root}_{i}_bn", kernel[-1])
            inputs = 4 * width
    yield from keras_layer("predictions", (2048, 1000))


def vgg_keras(repeats: tuple[int, ...]) -> Iterator[Entry]:
    inputs = 3
    for block, (count, width) in enumerate(zip(repeats, (64, 128, 256, 512, 512)), start=1):
        for i in range(1, count + 1):
            yield from keras_layer(f"block{block}_conv{i}", (3, 3, inputs, width))
            inputs = width
    yield from keras_layer("fc1", (25088, 4096))
    yield from keras_layer("fc2", (4096, 4096))
    yield from keras_layer("predictions", (4096, 1000))


FILES = {
    "resnet50_torchvision": lambda: resnet_torchvision((3, 4, 6, 3)),
    "resnet101_torchvision": lambda: resnet_torchvision((3, 4, 23, 3)),
    "vgg16_torchvision": lambda: vgg_torchvision("aaMbbMcccMdddMdddM"),
    "vgg19_torchvision": lambda: vgg_torchvision("aaMbbMccccMddddMddddM"),
    "mobilenet_v2_torchvision": mobilenet_v2_torchvision,
    "mobilenet_v2_torchvision, timm": lambda: inverted_timm(V2),
    "efficientnet_lite0, timm": lambda: inverted_timm(LITE0),
    "vgg16_torchvision, timm": lambda: vgg_timm("aaMbbMcccMdddMdddM"),
    "vgg19_torchvision, timm": lambda: vgg_timm("aaMbbMccccMddddMddddM"),
    "resnet50_keras": lambda: resnet_keras((3, 4, 6, 3)),
    "resnet101": lambda: resnet_keras((3, 4, 23, 3)),
    "vgg16": lambda: vgg_keras((2, 2, 3, 3, 3)),
    "vgg19": lambda: vgg_keras((2, 2, 4, 4, 4)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_framework_fits(name):
    source = {key: np.broadcast_to(np.float32(1), shape) for key, shape in FILES[name]()}
    entry = zoo.find(name.partition(",")[0])
    shapes = tree.template(entry.module(), entry.preprocessing.size)
    naming = tree.best_naming(shapes, source, entry.namings)
    variables = tree.assemble(shapes, source, naming)
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)


def test_the_first_dense_layer_of_vgg_sees_channels_first_in_torch(rng):
    features = rng.normal(size=(7, 7, 512)).astype(np.float32)
    weight = rng.normal(size=(3, 25088)).astype(np.float32)
    expected = weight @ features.transpose(2, 0, 1).reshape(-1)
    in_timm = weight.reshape(3, 512, 7, 7)
    for naming, array in ((names.vgg_torchvision(16), weight), (names.vgg_timm(16), in_timm)):
        kernel = naming.layout.convert(array, (25088, 3))
        np.testing.assert_allclose(features.reshape(-1) @ kernel, expected, rtol=1e-3, atol=1e-3)


def test_stages_and_blocks_of_older_keras_files_are_letters():
    layer = names.resnet_keras_letters().layer
    assert layer("stem/bn") == "bn_conv1"
    assert layer("stage3_block6/conv2/conv") == "res4f_branch2b"
    assert layer("stage1_block1/shortcut/bn") == "bn2a_branch1"
