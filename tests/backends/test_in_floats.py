"""Products of integers that floats hold, at the largest sums that they are trusted with."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends import in_floats
from jaxquant.graph.contraction import dot


@pytest.mark.parametrize("zero_points", [(0, 0), (-128, 0), (5, -128), (127, -128)])
def test_the_largest_sums_are_exact(zero_points):
    terms = 1
    while in_floats.fits(terms + 1, zero_points):
        terms += 1
    assert terms * np.prod([128 + abs(z) for z in zero_points]) <= 2**24
    rng = np.random.default_rng(0)
    extremes = np.array([-128, 127], np.int8)
    x, w = (rng.choice(extremes, size) for size in ((2, 7, terms), (2, terms, 5)))
    x[0, 0], w[0, :, 0] = (-128 if z > 0 else 127 for z in zero_points)  # far from zero: all alike
    contraction = dot((((2,), (1,)), ((0,), (0,))), (3, 3))
    want = np.einsum("bmk,bkn->bmn", *(v.astype(np.int64) - z for v, z in zip((x, w), zero_points)))
    # A TPU rounds what it multiplies to bfloat16.
    narrow = [np.asarray(v, np.float32) - z for v, z in zip((x, w), zero_points)]
    assert all(np.array_equal(v.astype(jnp.bfloat16).astype(np.float32), v) for v in narrow)
    got = in_floats.dot((jnp.asarray(x), jnp.asarray(w, jnp.float32)), contraction, zero_points)
    np.testing.assert_array_equal(got, want.astype(np.float64))
