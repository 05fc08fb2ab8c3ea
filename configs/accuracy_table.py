r"""The accuracy table: every network under every method, side by side.

On 650 ImageNet validation images with 100 of 500 others to calibrate on, each a folder with
labels.csv, and on the 10,000 test images of CIFAR-10 (downloads, once):

  python experiments/accuracy_table.py --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES \
    --config.weights.googlenet=FILE --config.weights.mobilenet_v2=FILE \
    --config.weights.cifar10_resnet20=FILE --markdown=docs/results.md

--methods and --models choose some of them, --dry_run lists what would run, and
--recover=none,bias_correction,equalization+bias_correction measures each method with each of these
recoveries. A network of the zoo that is not below is measured by its name:
--models=vgg16_torchvision --config.weights.vgg16_torchvision=FILE.
"""

from ml_collections import ConfigDict

from configs import common, settings
from experiments import zoo

_OF_A_METHOD = {
    "algo", "quantizable_op_type", "is_full_quantize", "weight_quantize_type", "skip"
}  # fmt: skip
_OF_ONE_NETWORK = {"model", "weights", "save_model_path", "progress"}

SETTINGS: settings.Settings = {
    **{k: v for k, v in common.SETTINGS.items() if k not in _OF_A_METHOD | _OF_ONE_NETWORK},
    "models": (
        (
            "googlenet",
            "mobilenet_v1",
            "mobilenet_v2",
            "resnet50",
            "resnet101",
            "vgg16",
            "vgg19",
            "efficientnet_lite0",
            "cifar10_resnet20",
        ),
        "networks of experiments/zoo.py",
    ),
    "processes": (0, "at once; 0: as many as cores and memory allow"),
    "memory_gigabytes": (0.0, "for all of them; 0: what is free"),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """`arg`: "runlocal" for a smoke test."""
    given = common.parse_arg(arg, runlocal=False)
    config = settings.make(SETTINGS)
    # A file for each network; empty: the registry package that carries its weights, if one does.
    config.weights = ConfigDict(dict.fromkeys(zoo.MODELS, ""))
    # Settings of single networks, which go before the others. The data of CIFAR-10 are a package.
    config.per_model = ConfigDict({
        name: {"dataset": "cifar10", "data_dir": "", "tfds": "", "batch_size": 100}
        for name in zoo.MODELS
        if name.startswith("cifar10_")
    })  # fmt: skip
    if given.runlocal:
        common.run_local(config)
        config.models = ("vgg16", "cifar10_resnet20")
        config.weights.cifar10_resnet20 = "random"
        config.per_model = ConfigDict()
        config.processes = 1
    return config
