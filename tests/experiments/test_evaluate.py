import jax
import numpy as np
import pytest

from experiments.evaluate import (
    Evaluation,
    agreement,
    evaluate,
    sqnr_db,
    topk_accuracy,
    topk_correct,
)

LOGITS = np.float32([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5], [1, 0, 0, 0, 0, 0]])


def test_topk_accuracy():
    evaluation = Evaluation(LOGITS, np.int32([0, 0, 5]), 0.0)
    assert topk_accuracy(evaluation, 1) == pytest.approx(100 / 3)
    assert topk_accuracy(evaluation, 2) == pytest.approx(200 / 3)  # five logits tie at rank 2
    assert topk_accuracy(evaluation, 6) == pytest.approx(100)
    assert topk_correct(evaluation, 1).tolist() == [True, False, False]


def test_agreement_and_sqnr():
    other = LOGITS.copy()
    other[0, 0] = -1
    assert agreement(LOGITS, other) == pytest.approx(200 / 3)
    signal, noise = np.sum(LOGITS.astype(np.float64) ** 2), 36.0
    assert sqnr_db(LOGITS, other) == pytest.approx(10 * np.log10(signal / noise))
    assert sqnr_db(LOGITS, LOGITS) == float("inf")


def test_a_ragged_batch_counts_once_and_compiles_nothing_new():
    traces = []

    @jax.jit
    def model(images):
        traces.append(images.shape)
        return images.reshape(images.shape[0], -1)

    batches = [(np.ones((4, 2, 2, 1), np.float32), np.zeros(4, np.int32))] * 2
    batches.append((np.full((3, 2, 2, 1), 7, np.float32), np.ones(3, np.int32)))
    result = evaluate(model, batches, batch_size=4)
    assert traces == [(4, 2, 2, 1)]
    assert result.logits.shape == (11, 4)
    np.testing.assert_array_equal(result.logits[8:], 7)
    assert result.labels.tolist() == [0] * 8 + [1] * 3


def test_a_model_that_gives_nan_is_an_error():
    batch = (np.ones((3, 2), np.float32), np.zeros(3, np.int32))

    def model(images):
        return images / np.float32([[1.0], [0.0], [0.0]])

    with (
        pytest.raises(ValueError, match=r"infinity for 2 of 3 images, .* image 1"),
        np.errstate(all="ignore"),
    ):
        evaluate(model, [batch], batch_size=3)


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="no images"):
        evaluate(lambda images: images, [], batch_size=4)
