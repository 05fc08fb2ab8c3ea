"""What the experiments' configs have in common. Not run by itself."""

from ml_collections import ConfigDict

from configs import settings


def parse_arg(arg: str | None, **defaults: bool | int | float | str) -> ConfigDict:
    """Reads what follows the colon in `--config=configs/NAME.py:key=value,flag`.

    Args:
      arg: the text, or None.
      **defaults: the keys that the config knows, and their types by example.
    """
    parsed = ConfigDict(defaults)
    for item in filter(None, (arg or "").split(",")):
        key, _, text = item.partition("=")
        if key not in defaults:
            raise ValueError(f"config argument {key!r} in {arg!r}: known are {', '.join(defaults)}")
        kind = type(defaults[key])
        if kind is bool and text not in ("", "True", "False"):
            raise ValueError(
                f"config argument {key!r} is a flag, not {text!r}: write True or False"
            )
        parsed[key] = text in ("", "True") if kind is bool else kind(text)
    return parsed


# The settings of `experiments/quant_post.py`.
SETTINGS: settings.Settings = {
    "model": ("", "a network of experiments/zoo.py"),
    "weights": ("", "a weight file; empty: the registry package that carries them"),
    "dataset": ("foolbox", "images to use without a folder: foolbox (20), cifar10 or noise"),
    "data_dir": (
        "",
        "a folder of images to evaluate on: with labels.csv or PaddlePaddle's val_list.txt, one "
        "subfolder a class, or ImageNet's own",
    ),
    "calib_dir": ("", "another one to calibrate on; empty: data_dir"),
    "tfds": ("", "or a data set of tensorflow-datasets"),
    "tfds_dir": ("", "where that was prepared; empty: its default"),
    "tfds_split": ("validation", "its part to evaluate on"),
    "tfds_calib_split": ("train", "its part to calibrate on"),
    "image_size": (0, "0: what the network was trained for"),
    "num_classes": (0, "likewise"),
    "calib_samples": (100, "images to calibrate on"),
    "eval_samples": (0, "images to evaluate on; 0: all"),
    "batch_size": (10, "images at a time"),
    "workers": (4, "threads that decode images"),
    "algo": ("KL", "how thresholds are chosen; this and those below: see jaxquant.quant_post"),
    "quantizable_op_type": (
        ("conv2d", "depthwise_conv2d", "mul", "lookup_table"),
        "the kinds that become int8",
    ),
    "is_full_quantize": (False, "all kinds become int8"),
    "target": ("any", "or litert: what LiteRT's kernels compute"),
    "weight_quantize_type": ("channel_wise_abs_max", "or abs_max: one scale for each weight"),
    "activation_quantize_type": ("asymmetric", "or symmetric, dynamic"),
    "recover": (("outliers", "bias_correction"), "the steps that repair the int8 model"),
    "skip": ((), "patterns of sites that stay float"),
    "rules": (
        (),
        "settings for some sites: dicts of what jaxquant.Rule takes, such as "
        "{'pattern': 'head/*', 'algo': 'mse'}",
    ),
    "optimize_for": ("size", "or speed: what int8 makes slower here stays float"),
    "save_model_path": ("", "where to save the int8 model, a .safetensors file; empty: nowhere"),
    "progress": (True, "show what is being done"),
}


def get_config(model: str, dataset: str = "foolbox", runlocal: bool = False) -> ConfigDict:
    """`SETTINGS` for a network of `experiments/zoo.py`.

    Args:
      model: its name.
      dataset: the embedded data, used where neither `data_dir` nor `tfds` is given.
      runlocal: a smoke test: random weights and a few small images of noise, no downloads.
    """
    config = settings.make(SETTINGS)
    config.model, config.dataset = model, dataset
    if runlocal:
        config.weights, config.progress = "random", False
        run_local(config)
    return config


def run_local(config: ConfigDict) -> None:
    """Makes a smoke test of settings: a few small images of noise, no downloads."""
    config.dataset = "noise"
    config.image_size = 32
    config.calib_samples = 4
    config.eval_samples = 6
    config.batch_size = 4
