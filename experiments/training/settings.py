"""Settings that are checked before any work, and the data that they name."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import data, imagenet
from experiments.training import TrainingError
from experiments.training.augmentation import AUGMENTATIONS
from experiments.training.optimizers import OPTIMIZERS

# What a run that goes on may change: nothing of this decides what is learnt, but for the rounding
# that another number of devices brings.
FREE = {
    "cache_megabytes",
    "checkpoint_steps",
    "devices",
    "eval_epochs",
    "keep",
    "log_steps",
    "progress",
    "workers",
}

POSITIVE = ("batch_size", "epochs", "keep", "learning_rate", "log_steps", "workers")
NOT_NEGATIVE = (
    "cache_megabytes",
    "checkpoint_steps",
    "clip_norm",
    "devices",
    "eval_epochs",
    "eval_samples",
    "image_size",
    "momentum",
    "num_classes",
    "seed",
    "steps",
    "train_samples",
    "warmup_epochs",
    "weight_decay",
)
DTYPES = ("float32", "bfloat16")


def check(config: ConfigDict) -> None:
    """Refuses settings that mean nothing.

    Raises:
      TrainingError: naming all of them.
    """
    wrong = [f"{name} should be positive" for name in POSITIVE if not config[name] > 0]
    wrong += [f"{name} should not be negative" for name in NOT_NEGATIVE if not config[name] >= 0]
    for name, choices in (
        ("augmentation", AUGMENTATIONS),
        ("optimizer", OPTIMIZERS),
        ("dtype", DTYPES),
    ):
        if config[name] not in choices:
            wrong.append(f"{name} should be one of {', '.join(choices)}")
    for name in ("label_smoothing", "momentum"):
        if not config[name] < 1:
            wrong.append(f"{name} should be less than 1")
    if not config.label_smoothing >= 0:
        wrong.append("label_smoothing should not be negative")
    if wrong:
        lines = (f"--config.{line}; it is {config[line.split()[0]]!r}" for line in wrong)
        raise TrainingError("settings that cannot be trained with:\n  " + "\n  ".join(lines))


def check_resumed(given: dict[str, Any], saved: dict[str, Any]) -> None:
    """Refuses to go on with a run under settings that change what it learns.

    Args:
      given: the settings now.
      saved: those of the run's config.json.

    Raises:
      TrainingError: naming the settings that differ.
    """
    changed = [
        f"{name}: {saved.get(name)!r} there, {given.get(name)!r} given"
        for name in sorted(given.keys() | saved.keys())
        if name not in FREE and given.get(name) != saved.get(name)
    ]
    if changed:
        raise TrainingError(
            "the work folder has a run with other settings; give the same ones to go on with it, "
            "or another --workdir:\n  " + "\n  ".join(changed)
        )


def choose_data(config: ConfigDict, size: int) -> tuple[data.Dataset, data.Dataset]:
    """The images to train on and those to evaluate on.

    Args:
      config: `data_dir` goes before `tfds`, which goes before the embedded `dataset`. Where
        `data_dir` has the folders `train` and `val` of ImageNet, they are the two.
      size: of the images that the network takes, for noise.

    Raises:
      TrainingError: no data, or a folder to train on without one to evaluate on.
      DataError, FetchError: there is no such data.
    """
    if config.data_dir:
        folders = imagenet.splits(Path(config.data_dir).expanduser())
        train_dir, eval_dir = folders or (config.data_dir, "")
        if not (config.eval_dir or eval_dir):
            raise TrainingError(
                f"--config.data_dir={config.data_dir} is trained on, as it has no folders train "
                "and val; give --config.eval_dir too"
            )
        train, evaluation = data.folder(train_dir), data.folder(config.eval_dir or eval_dir)
    elif config.tfds:
        train, evaluation = (
            data.tfds(config.tfds, split, config.tfds_dir or None)
            for split in (config.tfds_split, config.tfds_eval_split)
        )
    elif not config.dataset:
        raise TrainingError(
            "nothing to train on: give --config.data_dir and --config.eval_dir (folders of "
            "images), --config.tfds (a data set of tensorflow-datasets) or "
            "--config.dataset=cifar10"
        )
    else:
        train, evaluation = data.embedded(config.dataset, size)
    if config.train_samples:
        train = data.subset(train, config.train_samples)
    if config.eval_samples:
        evaluation = data.subset(evaluation, config.eval_samples)
    return train, evaluation
