"""What the configs of trainings have in common. Not run by itself."""

from ml_collections import ConfigDict

from configs import settings

# The settings of `experiments/train.py`.  The defaults are the recipe of ResNet on ImageNet (Goyal
# et al., arXiv:1706.02677).
SETTINGS: settings.Settings = {
    "model": ("", "a network of experiments/zoo.py"),
    "num_classes": (0, "0: what the network was published for"),
    "image_size": (0, "likewise"),
    "dataset": ("", "cifar10 or noise; used where neither data_dir nor tfds is given"),
    "data_dir": (
        "",
        "a folder of images to train on: with labels.csv or PaddlePaddle's train_list.txt, one "
        "subfolder a class, or ImageNet's own",
    ),
    "eval_dir": ("", "and one to evaluate on; empty: data_dir has the folders train and val"),
    "tfds": ("", "or a data set of tensorflow-datasets"),
    "tfds_dir": ("", "where that was prepared; empty: its default"),
    "tfds_split": ("train", "its part to train on"),
    "tfds_eval_split": ("validation", "its part to evaluate on"),
    "train_samples": (0, "images to train on; 0: all"),
    "eval_samples": (0, "images to evaluate on; 0: all"),
    "augmentation": ("resized_crop", "with a flip; shift: with a flip; none"),
    "epochs": (90.0, "passes over the images"),
    "steps": (0, "in place of epochs"),
    "warmup_epochs": (5.0, "in which the learning rate rises"),
    "batch_size": (256, "over all devices"),
    "learning_rate": (0.1, "at this batch size; in proportion for another"),
    "optimizer": ("sgd", "or rmsprop"),
    "momentum": (0.9, "of the optimizer"),
    "nesterov": (True, "momentum by Nesterov's rule"),
    "weight_decay": (1e-4, "on kernels alone"),
    "label_smoothing": (0.0, "of the one-hot labels"),
    "clip_norm": (0.0, "of the gradient; 0: none"),
    "zero_residuals": (False, "each residual block of a ResNet starts as the identity"),
    "dtype": ("float32", "or bfloat16, for accelerators; the weights stay float32"),
    "seed": (0, "of the weights and the order of the images"),
    "devices": (0, "0: all of this machine"),
    "workers": (4, "threads that make batches"),
    "cache_megabytes": (1000, "keep decoded images, if they all fit and are not cut at random"),
    "log_steps": (100, "steps between two lines of the log"),
    "checkpoint_steps": (0, "steps between two checkpoints; 0: once an epoch"),
    "keep": (2, "newest checkpoints to keep"),
    "eval_epochs": (1.0, "epochs between two evaluations; 0: only at the end"),
    "progress": (True, "show what is being done"),
}


def get_config(model: str, **recipe: settings.Value) -> ConfigDict:
    """`SETTINGS` for a network of `experiments/zoo.py`.

    Args:
      model: its name.
      **recipe: settings of the network that differ.
    """
    config = settings.make(SETTINGS)
    config.update({"model": model, **recipe})
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
