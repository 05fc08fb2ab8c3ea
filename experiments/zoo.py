"""The networks by name: module, weights and preprocessing."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn

from experiments.models.efficientnet_lite import VARIANTS, EfficientNetLite
from experiments.preprocessing import Preprocessing, imagenet
from experiments.weights import fetch, names, torch_pth, tree


class Entry(NamedTuple):
    """One network.

    Attributes:
      module: makes the Flax module.
      preprocessing: what its weights were trained with.
      read: (weight file, shapes of the model) -> its variables.
      package: fetches the weight file; None where no registry has it.
    """

    module: Callable[[], nn.Module]
    preprocessing: Preprocessing
    read: Callable[[Path, tree.Variables], tree.Variables]
    package: Callable[[], Path] | None = None


def load(name: str, weights: str | None = None) -> tuple[nn.Module, tree.Variables]:
    """A network with its trained weights.

    Args:
      name: a key of `MODELS`.
      weights: a weight file; None takes the registry package that carries the weights.
    """
    entry = find(name)
    if weights is None and entry.package is None:
        raise tree.WeightsError(f"{name}: no package carries its weights; give a file as `weights`")
    path = Path(weights).expanduser() if weights else entry.package()
    if not path.is_file():
        raise tree.WeightsError(f"{name}: there is no weight file {path}")
    module = entry.module()
    try:
        return module, entry.read(path, tree.template(module, entry.preprocessing.size))
    except tree.WeightsError as error:
        raise tree.WeightsError(f"{name}, from {path}: {error}") from error


def find(name: str) -> Entry:
    """The network of that name."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no model {name!r}{hint} There are {', '.join(MODELS)}.")
    return MODELS[name]


def _efficientnet_lite(variant: str) -> Entry:
    size = VARIANTS[variant].image_size
    return Entry(
        module=lambda: EfficientNetLite(variant),
        preprocessing=imagenet(size, mean=(127.0,) * 3, std=(128.0,) * 3),
        read=lambda path, shapes: _read_efficientnet(variant, path, shapes),
        package=_lite0_package if variant == "lite0" else None,
    )


def _read_efficientnet(variant: str, path: Path, shapes: tree.Variables) -> tree.Variables:
    arrays = torch_pth.read_pth(path)
    is_timm = "conv_stem.weight" in arrays
    layer_name = names.efficientnet_timm(variant) if is_timm else names.efficientnet_pytorch
    return tree.assemble(shapes, arrays, layer_name, tree.TORCH)


def _lite0_package() -> Path:
    return fetch.extract(fetch.EFFICIENTNET_LITE0, ("*/efficientnet-lite0-57934424.pth",))[0]


MODELS = {f"efficientnet_{variant}": _efficientnet_lite(variant) for variant in VARIANTS}
