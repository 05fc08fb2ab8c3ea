"""From the settings of an experiment to its network and its images."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from experiments import data, imagenet, zoo
from experiments.evaluate import Evaluation, evaluate
from experiments.loader import batches
from experiments.preprocessing import Preprocessing
from experiments.weights.tree import Variables, random_variables, template
from jaxquant.progress import Progress


class Setup(NamedTuple):
    """A trained network, and the images to calibrate and evaluate it on."""

    module: nn.Module
    variables: Variables
    preprocessing: Preprocessing
    calibration: data.Dataset
    evaluation: data.Dataset
    batch_size: int
    workers: int
    progress: bool

    def evaluate(self, model: Callable[[np.ndarray], jax.Array]) -> Evaluation:
        """What a model, images -> logits, says about the images to evaluate on."""
        images = batches(self.evaluation, self.preprocessing, self.batch_size, self.workers)
        size = self.evaluation.size
        total = None if size is None else math.ceil(size / self.batch_size)
        with (
            Progress("the evaluation", self.progress) as shown,
            shown.stage("evaluating", total, "batch") as stage,
        ):
            return evaluate(model, stage.each(images), self.batch_size)

    def evaluate_float(self) -> Evaluation:
        """What the network itself says about them."""
        model = jax.jit(self.module.apply)
        return self.evaluate(lambda images: model(self.variables, images))

    def calibration_batches(self) -> Iterator[np.ndarray]:
        """Starts a pass over the images to calibrate on, without their labels."""
        labelled = batches(self.calibration, self.preprocessing, self.batch_size, self.workers)
        return (images for images, _ in labelled)


def prepare(config: ConfigDict) -> Setup:
    """What the settings of `configs/common.py` name.

    Raises:
      WeightsError, FetchError, DataError: something of it is not there.
    """
    module, variables = load_model(config)
    preprocessing = model_input(config)
    chosen = choose_data(config, preprocessing.size)
    batch_size, workers, progress = config.batch_size, config.workers, config.progress
    return Setup(module, variables, preprocessing, *chosen, batch_size, workers, progress)


def load_model(config: ConfigDict) -> tuple[nn.Module, Variables]:
    """The network and its variables; weights of "random" are for smoke tests."""
    if config.weights != "random":
        return zoo.load(config.model, config.weights or None, config.num_classes, config.image_size)
    module = zoo.build(config.model, config.num_classes)
    return module, random_variables(template(module, model_input(config).size))


def model_input(config: ConfigDict) -> Preprocessing:
    """The network's preprocessing, at the image size of the config if it gives one."""
    preprocessing = zoo.find(config.model).preprocessing
    return preprocessing.at_size(config.image_size) if config.image_size else preprocessing


def choose_data(config: ConfigDict, size: int) -> tuple[data.Dataset, data.Dataset]:
    """The images to calibrate on and those to evaluate on.

    Args:
      config: `data_dir` goes before `tfds`, which goes before the embedded `dataset`.  Where
        `data_dir` has the folders `train` and `val` of ImageNet, they are the two.
      size: of the images that the network takes, for noise.
    """
    if config.data_dir:
        train, val = imagenet.splits(Path(config.data_dir).expanduser()) or ("", config.data_dir)
        evaluation = data.folder(val)
        other = config.calib_dir or train
        calibration = data.folder(other) if other else evaluation
    elif config.tfds:
        folder = config.tfds_dir or None
        evaluation = data.tfds(config.tfds, config.tfds_split, folder)
        calibration = data.tfds(config.tfds, config.tfds_calib_split, folder)
    else:
        calibration, evaluation = data.embedded(config.dataset, size)
    if config.eval_samples:
        evaluation = data.subset(evaluation, config.eval_samples)
    return data.subset(calibration, config.calib_samples), evaluation


def described(dataset: data.Dataset) -> str:
    """The name of a data set and how many images it has."""
    return f"{dataset.name} ({'all' if dataset.size is None else dataset.size} images)"
