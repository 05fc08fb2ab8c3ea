"""Rounding with feedback against the algorithm as its paper writes it, in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.code_tables import VALUES
from jaxquant.recover.feedback import BLOCK, mixing, output_error, round_with_feedback

DAMPING = 0.01


def draw(rows: int, length: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [R, K] whose channels go together, some larger than others, and a weight [K, N]."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(length, length)) / np.sqrt(length) + np.eye(length)
    x = rng.normal(size=(rows, length)) @ mixed * rng.uniform(0.2, 3, length)
    return x, rng.normal(size=(length, width)).astype(np.float32)


def step_of(weight: np.ndarray) -> np.ndarray:
    """A step for each column, as of 4 bits."""
    return np.broadcast_to(np.abs(weight).max(axis=0) / 7, weight.shape).astype(np.float32)


def nearest_integer(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), -8, 7)


def of_the_paper(
    weight: np.ndarray,
    step: np.ndarray,
    covariance: np.ndarray,
    nearest: Callable[[np.ndarray], np.ndarray] = nearest_integer,
) -> np.ndarray:
    """Algorithm 1 of Frantar et al., in float64, without blocks: rows in turn, by a Cholesky of the
    inverse; the rows that are left take the error of each at once."""
    length = len(covariance)
    left, found = weight.astype(np.float64), np.zeros(weight.shape)
    damped = covariance + DAMPING * np.mean(np.diag(covariance)) * np.eye(length)
    inverse = np.linalg.cholesky(np.linalg.inv(damped)).T
    for k in range(length):
        found[k] = nearest(left[k] / step[k])
        error = (left[k] - found[k] * step[k]) / inverse[k, k]
        left[k + 1 :] -= np.outer(inverse[k, k + 1 :], error)
    return found


@pytest.mark.parametrize("length", [5, BLOCK, 2 * BLOCK + 9])
def test_equals_the_paper(length):
    x, weight = draw(4 * length, length, 6)
    step, covariance = step_of(weight), x.T @ x
    order, mix = mixing(covariance[None], DAMPING)
    order = order[0]
    assert np.diag(covariance)[order].tolist() == sorted(np.diag(covariance), reverse=True)
    found = np.asarray(round_with_feedback(weight[order][None], step[order][None], mix, (-8, 7)))[0]
    wanted = of_the_paper(weight[order], step[order], covariance[np.ix_(order, order)])
    # A float32 that rounds the other way at a tie moves all that come behind it in its column.
    assert np.mean(found == wanted) > 0.99


@pytest.mark.parametrize("name", VALUES)
def test_codes_of_a_table_equal_the_paper_too(name):
    values = VALUES[name].astype(np.float64)
    x, weight = draw(40, 9, 6)
    covariance = x.T @ x
    step = step_of(weight) * np.float32(7 / values.max())
    order, mix = mixing(covariance[None], DAMPING)
    order = order[0]
    codes = round_with_feedback(weight[order][None], step[order][None], mix, (-8, 7), name)
    wanted = of_the_paper(
        weight[order],
        step[order],
        covariance[np.ix_(order, order)],
        lambda x: values[np.abs(x[:, None] - values).argmin(axis=1)],
    )
    assert np.mean(values[np.asarray(codes)[0]] == wanted) > 0.95


def test_several_matrices_at_once_are_each_rounded_alone():
    pairs = [draw(100, 9, 3, seed) for seed in range(4)]
    covariances = np.stack([x.T @ x for x, _ in pairs])
    order, mix = mixing(covariances, DAMPING)
    weights = np.stack([w[o] for (_, w), o in zip(pairs, order, strict=True)])
    steps = np.stack([step_of(w) for w in weights])
    found = np.asarray(round_with_feedback(weights, steps, mix, (-8, 7)))
    for group in range(4):
        part = slice(group, group + 1)
        alone = round_with_feedback(weights[part], steps[part], mix[part], (-8, 7))
        np.testing.assert_array_equal(found[group], np.asarray(alone)[0])


def test_the_parts_give_the_covariance():
    x, _ = draw(50, 12, 1)
    covariance = x.T @ x
    order, mix = mixing(covariance, DAMPING)
    ordered = covariance[np.ix_(order, order)]
    ordered = ordered + DAMPING * np.mean(np.diag(covariance)) * np.eye(12)
    assert np.array_equal(mix, np.triu(mix))
    assert (np.diag(mix) == 1).all()
    inner = np.linalg.solve(mix.astype(np.float64), ordered)
    diagonal = np.linalg.solve(mix.astype(np.float64), inner.T)
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-3 * ordered.max())


def test_inputs_that_never_go_together_round_to_nearest():
    weight = np.random.default_rng(0).normal(size=(1, 7, 4)).astype(np.float32)
    step = step_of(weight[0])[None]
    for covariance in (np.eye(7), np.zeros((7, 7))):
        order, mix = mixing(covariance[None], DAMPING)
        assert order.tolist() == [list(range(7))]
        found = round_with_feedback(weight, step, mix, (-8, 7))
        np.testing.assert_array_equal(found, np.clip(np.rint(weight / step), -8, 7))


def test_the_error_is_that_of_the_outputs():
    x, error = draw(30, 8, 5)
    covariance = jnp.asarray(x.T @ x, jnp.float32)[None]
    found = float(output_error(covariance, jnp.asarray(error)[None]))
    assert found == pytest.approx(np.square(x @ error).sum(), rel=1e-4)
