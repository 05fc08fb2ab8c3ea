"""What a config asks for, ready to run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments import loader, zoo
from experiments.data import Dataset
from experiments.evaluate import evaluate, topk_accuracy
from experiments.preprocessing import Preprocessing
from experiments.training.augmentation import AUGMENTATIONS, Augmentation
from experiments.training.batches import Reader, batches, make_reader, steps_per_epoch
from experiments.training.initialisation import initial_variables
from experiments.training.optimizers import make_optimizer
from experiments.training.schedules import Schedule, warmup_cosine
from experiments.training.settings import choose_data
from experiments.training.step import State, Update, data_parallel, initial_state, make_update
from experiments.weights.tree import Variables, template


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
      module: the network, as it is evaluated: in float32.
      preprocessing: what it expects of an image.
      train: the images to train on.
      evaluation: those to evaluate on.
      augmentation: of the images to train on.
      reader: of the images to train on.
      epoch: the steps of one pass over them.
      steps: those of the whole training.
      rate: the learning rate at a step.
      update: the compiled step.
      forward: the compiled network, (variables, images) -> logits [B, K].
      state: before the first step, on the devices.
      split: how a batch lies on them.
      config: the rest of the settings.
    """

    module: nn.Module
    preprocessing: Preprocessing
    train: Dataset
    evaluation: Dataset
    augmentation: Augmentation
    reader: Reader
    epoch: int
    steps: int
    rate: Schedule
    update: Update
    forward: Callable[[Variables, jax.Array], jax.Array]
    state: State
    split: NamedSharding
    config: ConfigDict

    def batches(self, start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The training batches from step `start` on."""
        return batches(
            self.reader,
            self.train.size,
            self.augmentation,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            steps=range(start, self.steps),
            workers=self.config.workers,
        )

    def accuracy(self, state: State) -> dict[str, float]:
        """ "top1" and "top5" of the evaluation images, in percent."""
        size, workers = self.config.batch_size, self.config.workers
        labelled = loader.batches(self.evaluation, self.preprocessing, size, workers)
        measured = evaluate(
            lambda images: self.forward(state.variables, jax.device_put(images, self.split)),
            labelled,
            size,
        )
        return {"top1": topk_accuracy(measured, 1), "top5": topk_accuracy(measured, 5)}


def prepare(config: ConfigDict) -> Job:
    """Builds the network, finds the data and lays out the schedule; trains nothing yet.

    Raises:
      TrainingError: settings that do not fit the data or the devices.
      DataError, FetchError: there is no such data.
    """
    published = zoo.find(config.model).preprocessing
    preprocessing = published.at_size(config.image_size) if config.image_size else published
    module = zoo.build(config.model, config.num_classes)
    mesh = data_parallel(config.batch_size, jax.local_devices()[: config.devices or None])
    train, evaluation = choose_data(config, preprocessing.size)
    augmentation = AUGMENTATIONS[config.augmentation]
    reader = make_reader(
        train,
        preprocessing,
        augmentation,
        num_classes=module.num_classes,
        workers=config.workers,
        cache_bytes=config.cache_megabytes * 1_000_000,
    )
    epoch = steps_per_epoch(train.size, config.batch_size)
    steps = config.steps or max(1, round(config.epochs * epoch))
    rate = warmup_cosine(config.learning_rate, steps, round(config.warmup_epochs * epoch))
    optimizer = make_optimizer(
        config.optimizer,
        rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
    )
    variables = initial_variables(
        template(module, preprocessing.size), config.seed, config.zero_residuals
    )
    return Job(
        module=module,
        preprocessing=preprocessing,
        train=train,
        evaluation=evaluation,
        augmentation=augmentation,
        reader=reader,
        epoch=epoch,
        steps=steps,
        rate=rate,
        update=make_update(
            module.clone(dtype=jnp.dtype(config.dtype)),
            optimizer,
            preprocessing,
            mesh,
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        ),
        forward=jax.jit(module.apply),
        state=jax.device_put(
            initial_state(variables, optimizer), NamedSharding(mesh, PartitionSpec())
        ),
        split=NamedSharding(mesh, PartitionSpec("data")),
        config=config,
    )
