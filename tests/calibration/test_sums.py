"""The blocks in which candidates are evaluated, and the errors that rule most of them out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibration import sums


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (200,), (3, 130), (2, 2, 2048)])
def test_running_sums_of_whole_numbers_are_exact(shape, rng):
    x = rng.integers(0, 2**40, shape).astype(np.float64)
    want = np.concatenate([np.zeros((*shape[:-1], 1)), np.cumsum(x, axis=-1)], axis=-1)
    np.testing.assert_array_equal(sums.running(jnp.asarray(x)), want)


def test_blocks_without_a_candidate_are_skipped():
    """By a branch; under `vmap` both sides would be computed, so the searches map over tensors."""

    def function(h, limit):
        candidates = sums.candidate_thresholds(h, limit)
        grid = sums.Levels(jnp.asarray(127.0), 127)
        return sums.weighted_errors(h, candidates, limit, grid, 16.0)

    assert "cond[" in str(jax.make_jaxpr(function)(jnp.ones(256), jnp.asarray(256.0)))


@functools.partial(jax.jit, static_argnames="weight")
def evaluated(h, levels, limit, weight):
    """The candidates, the errors of all of them, and of those that clipping does not rule out."""
    grid = sums.Levels(levels, 255)
    candidates = sums.candidate_thresholds(h, limit)
    edges = sums.level_edges(candidates, grid, h.size)
    tables = sums.running_sums(h)
    errors = sums.squared_errors(tables, candidates, sums.look_up(tables, edges), grid)
    clipped = jnp.where(candidates < limit, sums.clipped_squares(h), 0.0)
    (found,) = sums.weighted_errors(h, candidates, limit, grid, weight)
    return errors + (weight - 1) * clipped, found


@pytest.mark.parametrize("weight", [1.0, 16.0])
@pytest.mark.parametrize("levels", [127.0, 255.0])
@pytest.mark.parametrize("shape", ["normal", "laplace", "outlier"])
@pytest.mark.parametrize("bins", [512, 450, 30])
def test_what_clipping_rules_out_costs_more_than_no_clipping(weight, levels, shape, bins, rng):
    """Against the errors of all candidates: the same ones are left, with the same errors."""
    x = {
        "normal": rng.normal(size=4000),
        "laplace": rng.laplace(size=4000),
        "outlier": np.append(rng.normal(size=4000), 20),
    }[shape]
    h = jnp.asarray(np.histogram(np.abs(x), bins)[0], jnp.float64)
    limit = jnp.asarray(bins - 0.5, jnp.float64)
    every, found = map(np.asarray, evaluated(h, jnp.asarray(levels), limit, weight))
    left = np.isfinite(found)
    assert 1 <= left.sum() < bins
    np.testing.assert_allclose(found[left], every[left], rtol=1e-9)
    assert (every[~left] > every[-1]).all()
