import numpy as np
import pytest

from experiments.accuracy.intervals import paired_difference
from experiments.evaluate import Evaluation
from experiments.results import loss


def of(classes: list[int]) -> Evaluation:
    """Says these classes for images of class 0."""
    return Evaluation(np.eye(10, dtype=np.float32)[classes], np.zeros(len(classes), np.int32), 0.0)


def test_the_loss_counts_images_that_only_one_model_has_right():
    fp32 = of([0, 0, 0, 0, 1, 2, 0, 3])
    int8 = of([0, 3, 4, 0, 0, 1, 5, 3])
    figures = loss(fp32, int8, 1)
    assert (figures["lost"], figures["gained"]) == (3, 1)
    assert figures["points"] == pytest.approx(25)
    ends = 100 * np.array(paired_difference(3, 1, 8))
    assert (figures["low"], figures["high"]) == pytest.approx(tuple(ends))
