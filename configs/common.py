"""What the experiments' configs have in common. Not run by itself."""

from ml_collections import ConfigDict


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


def get_config(model: str, dataset: str = "foolbox", runlocal: bool = False) -> ConfigDict:
    """The settings of `experiments/quant_post.py` for a network of `experiments/zoo.py`.

    Args:
      model: its name.
      dataset: the embedded data, used where neither `data_dir` nor `tfds` is given.
      runlocal: a smoke test: random weights and a few small images of noise, no downloads.
    """
    config = ConfigDict()
    config.model = model
    config.weights = ""  # a weight file; empty: the registry package that carries them

    config.dataset = dataset  # "foolbox" (20 images), "cifar10" or "noise"
    config.data_dir = ""  # a folder of images with labels.csv, to evaluate on
    config.calib_dir = ""  # another one to calibrate on; empty: data_dir
    config.tfds = ""  # or a data set of tensorflow-datasets
    config.tfds_dir = ""
    config.tfds_split = "validation"
    config.tfds_calib_split = "train"
    config.image_size = 0  # 0: what the network was trained for
    config.num_classes = 0  # likewise
    config.calib_samples = 100
    config.eval_samples = 0  # 0: all
    config.batch_size = 10
    config.workers = 4  # threads that decode images

    config.algo = "KL"
    config.quantizable_op_type = ("conv2d", "depthwise_conv2d", "mul")
    config.is_full_quantize = False
    config.weight_quantize_type = "channel_wise_abs_max"
    config.activation_quantize_type = "asymmetric"
    config.recover = ("bias_correction",)
    config.skip = ()
    config.optimize_for = "size"
    config.progress = True

    if runlocal:
        config.weights = "random"
        config.dataset = "noise"
        config.image_size = 32
        config.calib_samples = 4
        config.eval_samples = 6
        config.batch_size = 4
        config.progress = False
    return config
