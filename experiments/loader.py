"""Feeds a model: decodes images in parallel threads, a bounded number ahead of their use."""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from experiments.data import Dataset, Example
from experiments.preprocessing import Preprocessing

AHEAD = 2  # batches that are decoded while the model works on one


def batches(
    dataset: Dataset, preprocessing: Preprocessing, batch_size: int, workers: int = 4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes a data set in parallel, in its order, at most `AHEAD` batches before they are used.

    Yields:
      (images [B, size, size, 3] float32, labels [B] int32); the last batch may be smaller.
    """

    def load(example: Example) -> tuple[np.ndarray, int]:
        image, label = example()
        return preprocessing(image), label

    examples = dataset.examples()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        window = itertools.islice(examples, AHEAD * batch_size)
        pending = deque(pool.submit(load, example) for example in window)
        while pending:
            loaded = []
            while pending and len(loaded) < batch_size:
                loaded.append(pending.popleft().result())
                pending.extend(pool.submit(load, e) for e in itertools.islice(examples, 1))
            images, labels = zip(*loaded)
            yield np.stack(images), np.asarray(labels, dtype=np.int32)
    finally:
        pool.shutdown(cancel_futures=True)
