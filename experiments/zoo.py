"""The networks by name: module, preprocessing, and where their weights come from."""

import difflib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from experiments.errors import SettingsError
from experiments.models.cifar_resnet import CifarResNet
from experiments.models.efficientnet_lite import VARIANTS, EfficientNetLite
from experiments.models.googlenet import GoogLeNet
from experiments.models.mobilenet import MobileNetV1, MobileNetV2
from experiments.models.resnet import ResNet
from experiments.models.vgg import VGG
from experiments.preprocessing import Preprocessing, imagenet
from experiments.weights import fetch, formats, names, tree


class Entry(NamedTuple):
    """One network, as one framework trained it.

    Attributes:
      module: makes the Flax module.
      preprocessing: what its weights were trained with.
      namings: of the weight files that it can take, beside those that Flax saved.
      package: the registry package that carries its weights, and the files to unpack, the one to
        read first; None where no registry has them.
    """

    module: Callable[[], nn.Module]
    preprocessing: Preprocessing
    namings: tuple[tree.Naming, ...]
    package: tuple[fetch.Package, tuple[str, ...]] | None = None


def find(name: str) -> Entry:
    """The network of that name.

    Raises:
      SettingsError: there is none.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SettingsError(f"there is no model {name!r}{hint}; there are {', '.join(MODELS)}")
    return MODELS[name]


def build(name: str, num_classes: int = 0) -> nn.Module:
    """The module of that network, for `num_classes` classes; 0: as many as it was published for."""
    module = find(name).module()
    return module.clone(num_classes=num_classes) if num_classes else module


def load(
    name: str, weights: str | None = None, num_classes: int = 0, image_size: int = 0
) -> tuple[nn.Module, tree.Variables]:
    """A network with its trained weights.

    Args:
      name: a key of `MODELS`.
      weights: a weight file or an Orbax folder; None takes the registry package that carries them.
      num_classes: that the weights were trained for; 0: as many as the network was published for.
      image_size: that they were trained at, which shapes the dense layers of VGG; 0: likewise.

    Raises:
      WeightsError: there is no file, or it does not fit the network.
      FetchError: the package cannot be fetched.
    """
    entry = find(name)
    path = Path(weights) if weights else _packaged(name, entry)
    module = build(name, num_classes)
    shapes = tree.template(module, image_size or entry.preprocessing.size)
    cut = None
    try:
        arrays = formats.read(path)
    except tree.CutShortError as error:
        arrays, cut = error.arrays, error
    try:
        naming = tree.best_naming(shapes, arrays, (*entry.namings, tree.OUR_NAMES))
        variables = tree.assemble(shapes, arrays, naming)
    except tree.WeightsError as error:
        how = "which is cut short: " if cut else ""
        raise tree.WeightsError(f"{name}, from {path}: {how}{error}") from error
    if cut:  # behind the last parameter
        raise cut
    return module, variables


def weights_fingerprint(name: str, weights: str | None = None) -> str | None:
    """What tells the weights that `load` would take from others; None where there are none.

    Fetches nothing: a package stands for what it carries, a file is read.

    Raises:
      WeightsError: there is no such file, or its reader refuses it.
    """
    if weights:
        digest = hashlib.sha256()
        for key, array in sorted(formats.read(weights).items()):
            digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()
    package = find(name).package
    return package[0].sha256 if package else None


def _packaged(name: str, entry: Entry) -> Path:
    if entry.package is None:
        raise tree.WeightsError(
            f"{name}: no package carries its weights; give a file, with one of the suffixes "
            f"{', '.join(formats.READERS)}, or an Orbax folder (--config.weights=FILE)"
        )
    package, patterns = entry.package
    files = fetch.extract(package, patterns)
    return next(path for path in files if path.match(patterns[0]))


# Keras and Caffe subtract the mean of ImageNet, as BGR; torchvision also divides.
MINUS_MEAN = imagenet(224, mean=(103.939, 116.779, 123.68), std=(1.0,) * 3, channels="BGR")
CAFFE = imagenet(224, mean=(104.0, 117.0, 123.0), std=(1.0,) * 3, channels="BGR")
TO_ONE = imagenet(224, mean=(127.5,) * 3, std=(127.5,) * 3)
TORCHVISION = imagenet(224, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
CIFAR10 = TORCHVISION._replace(size=32, resize=32)


def _efficientnet_lite(variant: str) -> Entry:
    size = VARIANTS[variant].image_size
    return Entry(
        module=lambda: EfficientNetLite(variant),
        preprocessing=imagenet(size, mean=(127.0,) * 3, std=(128.0,) * 3),
        namings=(names.efficientnet_pytorch(), names.efficientnet_timm(variant)),
        package=(fetch.EFFICIENTNET_LITE0, ("*/efficientnet-lite0-57934424.pth",))
        if variant == "lite0"
        else None,
    )


def _resnet_keras(depth: int) -> Entry:
    return Entry(
        module=lambda: ResNet(depth, epsilon=1.001e-5),
        preprocessing=MINUS_MEAN,
        namings=(names.resnet_keras(),),
    )


RESNET_TORCHVISION = {"stride_on_3x3": True, "use_bias": False, "epsilon": 1e-5}


def _resnet_torchvision(depth: int) -> Entry:
    return Entry(
        module=lambda: ResNet(depth, **RESNET_TORCHVISION),
        preprocessing=TORCHVISION,
        namings=(names.resnet_torchvision(),),
    )


def _vgg_keras(depth: int) -> Entry:
    return Entry(lambda: VGG(depth), MINUS_MEAN, namings=(names.vgg_keras(),))


def _vgg_torchvision(depth: int) -> Entry:
    namings = names.vgg_torchvision(depth), names.vgg_timm(depth)
    return Entry(lambda: VGG(depth), TORCHVISION, namings)


def _cifar10_resnet(depth: int) -> Entry:
    return Entry(
        module=lambda: CifarResNet(depth),
        preprocessing=CIFAR10,
        namings=(names.resnet_torchvision(classifier="linear"),),
    )


def _cifar10(module: Callable[..., nn.Module], **settings: Any) -> Entry:
    """A network for ImageNet in the form that images of 32 pixels need; trained by us alone."""
    return Entry(lambda: module(num_classes=10, **settings), CIFAR10, namings=())


SMALL_RESNET = {**RESNET_TORCHVISION, "small_images": True}

MODELS = {
    **{f"efficientnet_{variant}": _efficientnet_lite(variant) for variant in VARIANTS},
    "mobilenet_v1": Entry(
        module=MobileNetV1,
        preprocessing=TO_ONE,
        namings=(names.mobilenet_v1_keras(),),
        package=(fetch.MOBILENET_V1, ("package/mobilenet/model.json", "package/mobilenet/group*")),
    ),
    "mobilenet_v2": Entry(
        module=MobileNetV2,
        preprocessing=TO_ONE,
        namings=tuple(map(names.mobilenet_v2_keras, ("Logits", "predictions"))),
    ),
    "mobilenet_v2_torchvision": Entry(
        module=lambda: MobileNetV2(even_padding=True, epsilon=1e-5),
        preprocessing=TORCHVISION,
        namings=(names.mobilenet_v2_torchvision(), names.mobilenet_v2_timm()),
    ),
    "googlenet": Entry(GoogLeNet, preprocessing=CAFFE, namings=(names.googlenet_caffe(),)),
    "resnet50": Entry(
        module=ResNet,
        preprocessing=MINUS_MEAN,
        namings=(names.resnet_keras_letters(),),
        package=(fetch.RESNET50, ("package/ResNet50/model.json", "package/ResNet50/group*")),
    ),
    "resnet50_keras": _resnet_keras(50),
    "resnet101": _resnet_keras(101),
    "resnet50_torchvision": _resnet_torchvision(50),
    "resnet101_torchvision": _resnet_torchvision(101),
    "resnet152_torchvision": _resnet_torchvision(152),
    "vgg16": _vgg_keras(16),
    "vgg19": _vgg_keras(19),
    "vgg16_torchvision": _vgg_torchvision(16),
    "vgg19_torchvision": _vgg_torchvision(19),
    # The same network on inputs of unit variance: without BatchNorm, training depends on them.
    "googlenet_scaled": Entry(GoogLeNet, preprocessing=TORCHVISION, namings=()),
    **{f"cifar10_resnet{depth}": _cifar10_resnet(depth) for depth in (20, 32, 44, 56, 110)},
    **{f"cifar10_resnet{d}": _cifar10(ResNet, depth=d, **SMALL_RESNET) for d in (50, 101, 152)},
    **{f"cifar10_vgg{depth}": _cifar10(VGG, depth=depth) for depth in (16, 19)},
    "cifar10_mobilenet_v1": _cifar10(MobileNetV1, stem_stride=1),
    "cifar10_mobilenet_v2": _cifar10(MobileNetV2, stem_stride=1),
    "cifar10_efficientnet_lite0": _cifar10(EfficientNetLite, stem_stride=1),
    "cifar10_googlenet": _cifar10(GoogLeNet),
}
