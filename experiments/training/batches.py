"""Shuffled, augmented batches whose content depends on the seed and the step alone."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.data import DataError, Dataset, Example
from experiments.preprocessing import Preprocessing
from experiments.training import TrainingError
from experiments.training.augmentation import Augmentation

# What random numbers are for; the first of a generator's keys, so that no two uses share one.
ORDER, IMAGE, BATCH = 1, 2, 3

# (positions in the data set [B], seed, epoch) -> images [B, S, S, 3] uint8, labels [B] int32.
Reader = Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]


def make_reader(
    dataset: Dataset,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    num_classes: int,
    workers: int,
    cache_bytes: int,
) -> Reader:
    """Reads images by their position, at the network's size.

    Where the augmentation leaves the decoding alone and the images fit into `cache_bytes`, they are
    all decoded here, once.

    Raises:
      TrainingError: the data set is a stream, which has no positions.
      DataError: a label is not below `num_classes`; raised when it is read.
    """
    if dataset.size is None:
        raise TrainingError(
            f"{dataset.name} is a stream, which cannot be shuffled by position; prepare it in a "
            "random-access format: tfds build --file_format=array_record"
        )
    examples = list(dataset.examples())
    size = preprocessing.size

    def decode(example: Example, *key: int) -> tuple[np.ndarray, int]:
        image, label = example()
        if not 0 <= label < num_classes:
            raise DataError(
                f"{dataset.name} has the label {label}, and the network {num_classes} classes: "
                "give --config.num_classes"
            )
        if augmentation.image is None:
            return preprocessing.crop(image), label
        return augmentation.image(image, size, np.random.default_rng(key)), label

    def read(chosen: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        loaded = [decode(examples[i], IMAGE, seed, epoch, i) for i in chosen.tolist()]
        images, labels = zip(*loaded)
        return np.stack(images), np.asarray(labels, dtype=np.int32)

    if augmentation.image is not None or len(examples) * size * size * 3 > cache_bytes:
        return read

    images = np.empty((len(examples), size, size, 3), np.uint8)
    labels = np.empty(len(examples), np.int32)

    def fill(i: int) -> None:
        images[i], labels[i] = decode(examples[i])

    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for _ in pool.map(fill, range(len(examples)), chunksize=64):
            pass
    return lambda chosen, seed, epoch: (images[chosen], labels[chosen])


@functools.lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The positions of an epoch's images, shuffled."""
    return np.random.default_rng((ORDER, seed, epoch)).permutation(count)


def batches(
    reader: Reader,
    count: int,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    steps: range,
    workers: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The batches of the given steps, made in threads, at most `workers` + 1 before their use.

    What an epoch leaves over after its last whole batch is dropped, other images in each epoch.

    Args:
      reader: of the images.
      count: how many there are.
      augmentation: of the batches.
      batch_size: B.
      seed: of the order and of the augmentation.
      steps: the steps to train; a run that resumes begins with a later one.
      workers: threads.

    Yields:
      (images [B, S, S, 3] uint8, labels [B] int32).
    """
    per_epoch = steps_per_epoch(count, batch_size)

    def make(step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(step, per_epoch)
        start = place * batch_size
        chosen = epoch_order(count, seed, epoch)[start : start + batch_size]
        images, labels = reader(chosen, seed, epoch)
        return augmentation.batch(images, np.random.default_rng((BATCH, seed, step))), labels

    remaining = iter(steps)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="batch")
    try:
        pending = deque(pool.submit(make, s) for s in itertools.islice(remaining, workers + 1))
        while pending:
            batch = pending.popleft().result()
            pending.extend(pool.submit(make, s) for s in itertools.islice(remaining, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def steps_per_epoch(count: int, batch_size: int) -> int:
    """How many whole batches the data set has."""
    if count < batch_size:
        raise TrainingError(f"{count} training images do not fill one batch of {batch_size}")
    return count // batch_size
