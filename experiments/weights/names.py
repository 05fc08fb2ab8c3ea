"""What weight files call the layers of our networks, one `Naming` for each kind of file."""

from collections.abc import Callable, Sequence

import numpy as np

from experiments.models import efficientnet_lite, mobilenet, vgg
from experiments.weights.tree import KERAS, TORCH, Naming

# For a unit of convolution and BatchNorm: what the file calls the one and the other.
Unit = tuple[str, str]


def by_unit(unit: Callable[[str], Unit], others: dict[str, str]) -> Callable[[str], str]:
    """Names the layers of a network that is made of units and a few layers beside them.

    Args:
      unit: "block3/expand" -> the file's names for its convolution and its BatchNorm.
      others: the file's names for the layers that are no part of a unit.
    """

    def layer(name: str) -> str:
        if name in others:
            return others[name]
        owner, kind = name.rsplit("/", 1)
        return unit(owner)[kind == "bn"]

    return layer


def _index(block: str) -> int:
    return int(block.removeprefix("block"))


def _stage_and_block(name: str) -> tuple[int, int]:
    """ "stage2_block3" -> (2, 3)."""
    stage, block = name.removeprefix("stage").split("_block")
    return int(stage), int(block)


def efficientnet_pytorch() -> Naming:
    """EfficientNet-Lite in checkpoints of the `efficientnet_pytorch` family."""
    outer = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    inner = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }

    def unit(name: str) -> Unit:
        if name in outer:
            return outer[name]
        block, part = name.split("/")
        conv, bn = inner[part]
        return f"_blocks.{_index(block)}.{conv}", f"_blocks.{_index(block)}.{bn}"

    return Naming(by_unit(unit, {"classifier": "_fc"}), TORCH)


def efficientnet_timm(variant: str) -> Naming:
    """EfficientNet-Lite in timm's `tf_efficientnet_lite*`."""
    stages = efficientnet_lite.scaled_stages(efficientnet_lite.VARIANTS[variant])
    return _inverted_bottlenecks_timm([len(blocks) for blocks in stages])


def mobilenet_v2_timm() -> Naming:
    """MobileNetV2 in timm's `mobilenetv2_100`."""
    return _inverted_bottlenecks_timm([stage.repeats for stage in mobilenet.V2_STAGES])


def _inverted_bottlenecks_timm(repeats: Sequence[int]) -> Naming:
    """Stages of so many blocks; those of the first do not expand."""
    places = [(stage, block) for stage, count in enumerate(repeats) for block in range(count)]
    outer = {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2")}
    separable = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    inverted = {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
    }

    def unit(name: str) -> Unit:
        if name in outer:
            return outer[name]
        block, part = name.split("/")
        stage, i = places[_index(block)]
        conv, bn = (inverted if stage else separable)[part]
        return f"blocks.{stage}.{i}.{conv}", f"blocks.{stage}.{i}.{bn}"

    return Naming(by_unit(unit, {"classifier": "classifier"}), TORCH)


def mobilenet_v1_keras() -> Naming:
    """MobileNetV1 in Keras."""

    def unit(name: str) -> Unit:
        if name == "stem":
            return "conv1", "conv1_bn"
        block, part = name.split("/")
        conv = f"conv_{'dw' if part == 'depthwise' else 'pw'}_{_index(block)}"
        return conv, f"{conv}_bn"

    return Naming(by_unit(unit, {"classifier": "conv_preds"}), KERAS)


def mobilenet_v2_keras(classifier: str) -> Naming:
    """MobileNetV2 in Keras, whose classifier is "Logits" in older files, else "predictions"."""
    outer = {"stem": ("Conv1", "bn_Conv1"), "head": ("Conv_1", "Conv_1_bn")}

    def unit(name: str) -> Unit:
        if name in outer:
            return outer[name]
        block, part = name.split("/")
        i = _index(block)
        conv = f"{f'block_{i}' if i else 'expanded_conv'}_{part}"
        return conv, f"{conv}_BN"

    return Naming(by_unit(unit, {"classifier": classifier}), KERAS)


def mobilenet_v2_torchvision() -> Naming:
    """MobileNetV2 in torchvision."""
    blocks = sum(stage.repeats for stage in mobilenet.V2_STAGES)
    outer = {"stem": 0, "head": blocks + 1}

    def unit(name: str) -> Unit:
        if name in outer:
            return f"features.{outer[name]}.0", f"features.{outer[name]}.1"
        block, part = name.split("/")
        i = _index(block)
        first = 0 if i == 0 else 1  # the first block does not expand
        place = {"expand": 0, "depthwise": first, "project": first + 1}[part]
        root = f"features.{i + 1}.conv.{place}"
        if part == "project":
            return root, f"features.{i + 1}.conv.{place + 1}"
        return f"{root}.0", f"{root}.1"

    return Naming(by_unit(unit, {"classifier": "classifier.1"}), TORCH)


def resnet_keras_letters() -> Naming:
    """ResNet in older Keras files: "res2a_branch2b"."""
    parts = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}

    def unit(name: str) -> Unit:
        if name == "stem":
            return "conv1", "bn_conv1"
        owner, part = name.split("/")
        stage, block = _stage_and_block(owner)
        end = f"{stage + 1}{chr(ord('a') + block - 1)}_branch{parts[part]}"
        return f"res{end}", f"bn{end}"

    return Naming(by_unit(unit, {"classifier": "fc1000"}), KERAS)


def resnet_keras() -> Naming:
    """ResNet in newer Keras files: "conv2_block1_2_conv"."""
    parts = {"shortcut": 0, "conv1": 1, "conv2": 2, "conv3": 3}

    def unit(name: str) -> Unit:
        if name == "stem":
            return "conv1_conv", "conv1_bn"
        owner, part = name.split("/")
        stage, block = _stage_and_block(owner)
        root = f"conv{stage + 1}_block{block}_{parts[part]}"
        return f"{root}_conv", f"{root}_bn"

    return Naming(by_unit(unit, {"classifier": "predictions"}), KERAS)


def resnet_torchvision(classifier: str = "fc", shortcut: str = "downsample") -> Naming:
    """ResNet in torchvision and timm; the CIFAR networks have the same names."""

    def unit(name: str) -> Unit:
        if name == "stem":
            return "conv1", "bn1"
        owner, part = name.split("/")
        stage, block = _stage_and_block(owner)
        root = f"layer{stage}.{block - 1}"
        if part == "shortcut":
            return f"{root}.{shortcut}.0", f"{root}.{shortcut}.1"
        return f"{root}.{part}", f"{root}.{part.replace('conv', 'bn')}"

    return Naming(by_unit(unit, {"classifier": classifier}), TORCH)


def vgg_keras() -> Naming:
    """VGG in Keras, whose names are ours but for the classifier."""
    return Naming(lambda layer: "predictions" if layer == "classifier" else layer, KERAS)


def vgg_torchvision(depth: int) -> Naming:
    """VGG in torchvision: convolutions by their place in a list with ReLUs and poolings."""
    places = {"fc1": "classifier.0", "fc2": "classifier.3", "classifier": "classifier.6"}
    position = 0
    for i, repeats in enumerate(vgg.REPEATS[depth], start=1):
        for j in range(1, repeats + 1):
            places[f"block{i}_conv{j}"] = f"features.{position}"
            position += 2
        position += 1

    def convert(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if array.ndim == 2 and array.shape[1] == 512 * 7 * 7:  # sees [C, H, W], ours [H, W, C]
            array = array.reshape(-1, 512, 7, 7).transpose(0, 2, 3, 1).reshape(len(array), -1)
        return TORCH.convert(array, shape)

    return Naming(places.__getitem__, TORCH._replace(convert=convert))


def vgg_timm(depth: int) -> Naming:
    """VGG in timm, whose hidden dense layers are convolutions that see the whole image."""
    torchvision = vgg_torchvision(depth)
    places = {"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2", "classifier": "head.fc"}

    def convert(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if array.ndim == 4 and len(shape) == 2:  # [O, C, H, W]
            return array.transpose(2, 3, 1, 0).reshape(-1, len(array))
        return TORCH.convert(array, shape)

    return Naming(
        lambda layer: places.get(layer) or torchvision.layer(layer), TORCH._replace(convert=convert)
    )


def googlenet_caffe() -> Naming:
    """GoogLeNet with Caffe's layer names, the kernels already in Flax's order."""
    places = {
        "conv1/conv": "conv1/7x7_s2",
        "conv2_reduce/conv": "conv2/3x3_reduce",
        "conv2/conv": "conv2/3x3",
        "classifier": "loss3/classifier",
    }

    def layer(name: str) -> str:
        return places.get(name) or name.removesuffix("/conv").replace("/conv", "/")

    return Naming(layer, KERAS)
