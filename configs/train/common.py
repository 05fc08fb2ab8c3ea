"""What the configs of trainings have in common. Not run by itself."""

from ml_collections import ConfigDict


def get_config(model: str, **recipe: bool | int | float | str) -> ConfigDict:
    """The settings of `experiments/train.py` for a network of `experiments/zoo.py`.

    The defaults are the recipe of ResNet on ImageNet (Goyal et al., arXiv:1706.02677).

    Args:
      model: its name.
      **recipe: settings of the network that differ.
    """
    config = ConfigDict()
    config.model = model
    config.num_classes = 0  # 0: what the network was published for
    config.image_size = 0  # likewise

    config.dataset = ""  # "cifar10" or "noise"; used where neither data_dir nor tfds is given
    config.data_dir = ""  # a folder of images to train on: labels.csv or one subfolder a class
    config.eval_dir = ""  # and one to evaluate on; empty: data_dir has the folders train and val
    config.tfds = ""  # or a data set of tensorflow-datasets
    config.tfds_dir = ""
    config.tfds_split = "train"
    config.tfds_eval_split = "validation"
    config.train_samples = 0  # 0: all
    config.eval_samples = 0  # likewise

    config.augmentation = "resized_crop"  # with a flip; "shift" with a flip; "none"
    config.epochs = 90.0
    config.steps = 0  # in place of epochs
    config.warmup_epochs = 5.0
    config.batch_size = 256  # over all devices
    config.learning_rate = 0.1  # at this batch size; in proportion for another
    config.optimizer = "sgd"  # or "rmsprop"
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 1e-4  # on kernels alone
    config.label_smoothing = 0.0
    config.clip_norm = 0.0  # of the gradient; 0: none
    config.zero_residuals = False  # each residual block of a ResNet starts as the identity
    config.dtype = "float32"  # or "bfloat16", for accelerators; the weights stay float32
    config.seed = 0

    config.devices = 0  # 0: all of this machine
    config.workers = 4  # threads that make batches
    config.cache_megabytes = 1000  # keep decoded images, if they all fit and are not cut at random
    config.log_steps = 100
    config.checkpoint_steps = 0  # 0: once an epoch
    config.keep = 2  # newest checkpoints
    config.eval_epochs = 1.0  # 0: only at the end
    config.progress = True
    config.update(recipe)
    return config


def run_local(config: ConfigDict) -> ConfigDict:
    """The same as a smoke test: two steps on a few small images of noise, no downloads."""
    config.dataset = "noise"
    config.image_size = 32
    config.eval_samples = 4
    config.steps = 2
    config.warmup_epochs = 0.0
    config.batch_size = 4
    config.devices = 1
    config.log_steps = 1
    config.progress = False
    return config
