"""Accuracy of a classifier, and how close two classifiers are. `N` images, `K` classes."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

Batch = tuple[np.ndarray, np.ndarray]


class Evaluation(NamedTuple):
    """What a model says about a data set.

    Attributes:
      logits: [N, K] float32.
      labels: [N] int32.
      seconds: for the pass over the data, decoding included and compilation not.
    """

    logits: np.ndarray
    labels: np.ndarray
    seconds: float


def evaluate(
    model: Callable[[np.ndarray], jax.Array], batches: Iterable[Batch], batch_size: int
) -> Evaluation:
    """Runs a model over batches of (images [B, H, W, C], labels [B]).

    A smaller last batch is filled up, so that the model is compiled for one shape alone.

    Args:
      model: images -> logits [B, K].
      batches: of at most `batch_size` images each.
      batch_size: the B that the model is compiled for.

    Raises:
      ValueError: there are no batches, or a logit is not finite.
    """
    logits, labels = [], []
    started = time.perf_counter()
    for images, batch_labels in batches:
        filled = np.pad(images, [(0, batch_size - len(images)), *[(0, 0)] * (images.ndim - 1)])
        if not logits:
            before = time.perf_counter()
            jax.block_until_ready(model(filled))
            started += time.perf_counter() - before
        logits.append(np.asarray(model(filled), dtype=np.float32)[: len(images)])
        labels.append(batch_labels)
    if not logits:
        raise ValueError("the data set to evaluate on has no images")
    seconds = time.perf_counter() - started
    evaluation = Evaluation(np.concatenate(logits), np.concatenate(labels), seconds)
    broken = np.flatnonzero(~np.isfinite(evaluation.logits).all(axis=1))
    if len(broken):
        raise ValueError(
            f"the model gives NaN or infinity for {len(broken)} of {len(evaluation.labels)} "
            f"images, the first of them image {broken[0]}"
        )
    return evaluation


def topk_correct(evaluation: Evaluation, k: int) -> np.ndarray:
    """Whether the label of each image is among the k largest logits: [N] bool."""
    logits, labels, _ = evaluation
    own = np.take_along_axis(logits, labels[:, None].astype(np.int64), axis=1)
    return np.sum(logits > own, axis=1) < k


def topk_accuracy(evaluation: Evaluation, k: int) -> float:
    """The share of images, in percent, whose label is among the k largest logits."""
    return float(100 * np.mean(topk_correct(evaluation, k)))


def agreement(reference: np.ndarray, other: np.ndarray) -> float:
    """The share of images, in percent, with the same first class; logits [N, K]."""
    return float(100 * np.mean(reference.argmax(axis=1) == other.argmax(axis=1)))


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Signal to quantization noise, in dB: 10 log10(sum r^2 / sum (r - o)^2), over all elements."""
    signal = np.sum(np.square(reference, dtype=np.float64))
    noise = np.sum(np.square(np.subtract(reference, other, dtype=np.float64)))
    return float(10 * np.log10(signal / noise)) if noise > 0 else float("inf")
