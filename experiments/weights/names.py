"""What each weight file calls the layers of our networks.

Every function maps a Flax layer, such as "block3/expand/conv", to the file's name for it.
"""

from collections.abc import Callable

from experiments.models import efficientnet_lite

LayerName = Callable[[str], str]


def efficientnet_pytorch(layer: str) -> str:
    """EfficientNet-Lite, in the names of the `efficientnet_pytorch` family of checkpoints."""
    if layer == "classifier":
        return "_fc"
    unit, kind = layer.rsplit("/", 1)
    outer = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}
    inner = {
        "expand": ("_expand_conv", "_bn0"),
        "depthwise": ("_depthwise_conv", "_bn1"),
        "project": ("_project_conv", "_bn2"),
    }
    if unit in outer:
        return outer[unit][kind == "bn"]
    block, part = unit.split("/")
    return f"_blocks.{block.removeprefix('block')}.{inner[part][kind == 'bn']}"


def efficientnet_timm(variant: str) -> LayerName:
    """EfficientNet-Lite, in the names of timm's `tf_efficientnet_lite*`."""
    stages = efficientnet_lite.scaled_stages(efficientnet_lite.VARIANTS[variant])
    places = [(s, b) for s, blocks in enumerate(stages) for b in range(len(blocks))]
    outer = {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2")}
    separable = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    inverted = {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
    }

    def name(layer: str) -> str:
        if layer == "classifier":
            return layer
        unit, kind = layer.rsplit("/", 1)
        if unit in outer:
            return outer[unit][kind == "bn"]
        block, part = unit.split("/")
        stage, index = places[int(block.removeprefix("block"))]
        parts = separable if stages[stage][index].expansion == 1 else inverted
        return f"blocks.{stage}.{index}.{parts[part][kind == 'bn']}"

    return name
