"""The blocks in which candidates are evaluated, and the errors that rule most of them out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibration import sums


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("size", [5, 64, 150])
def test_evaluate_is_the_function_where_needed_and_infinite_elsewhere(size):
    candidates = jnp.arange(1, size + 1, dtype=jnp.float64)
    needed = np.zeros(size, bool)
    needed[[1, size - 1]] = True
    found = sums.evaluate(lambda x: x**2, candidates, jnp.asarray(needed))
    np.testing.assert_array_equal(found, np.where(needed, np.arange(1, size + 1) ** 2, np.inf))


def test_evaluate_holds_a_branch_for_each_block():
    """Under `vmap` both sides of a branch would be computed; the searches map over tensors."""

    def function(candidates, needed):
        return sums.evaluate(jnp.square, candidates, needed)

    jaxpr = jax.make_jaxpr(jax.jit(function))(jnp.arange(256.0), jnp.arange(256) == 200)
    assert "cond[" in str(jaxpr)


@pytest.mark.parametrize("weight", [1.0, 16.0])
@pytest.mark.parametrize("levels", [127.0, 255.0])
@pytest.mark.parametrize("shape", ["normal", "laplace", "outlier"])
def test_what_clipping_rules_out_costs_more_than_no_clipping(weight, levels, shape, rng):
    """Against the errors of all candidates: the same ones are left, with the same errors."""
    x = {
        "normal": rng.normal(size=4000),
        "laplace": rng.laplace(size=4000),
        "outlier": np.append(rng.normal(size=4000), 20),
    }[shape]
    h = jnp.asarray(np.histogram(np.abs(x), 512)[0], jnp.float64)
    grid = sums.Levels(jnp.asarray(levels), 255)
    limit = jnp.asarray(511.5, jnp.float64)
    candidates = sums.candidate_thresholds(h, limit)
    edges = sums.level_edges(candidates, grid, 512)
    errors = sums.squared_errors(sums.running_sums(h), candidates, edges, grid)
    clipped = jnp.where(candidates < limit, sums.clipped_squares(h), 0.0)
    every = np.asarray(errors + (weight - 1) * clipped)

    found = np.asarray(sums.weighted_errors(h, candidates, limit, grid, weight))
    left = np.isfinite(found)
    assert 1 <= left.sum() < 512
    np.testing.assert_allclose(found[left], every[left], rtol=1e-9)
    assert (every[~left] > every[-1]).all()
