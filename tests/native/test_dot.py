"""The native dot has the reference's integers."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from tests.native.cases import int8_values, needs_kernels, settings, with_variants
from tests.native.test_conv import compile_fast

pytestmark = needs_kernels

sizes = st.integers(1, 70)


@settings
@hypothesis.given(sizes, sizes, sizes, st.sampled_from((0, -128, 5)))
def test_sums(rows: int, length: int, columns: int, zero_point: int):
    x, weight = int8_values(0, (rows, length)), int8_values(1, (length, columns), low=-127)

    @compile_fast
    def run(x: jax.Array, weight: jax.Array) -> dict[str, jax.Array]:
        packed = native.pack_dot(weight)
        return with_variants(
            lambda: native.dot(
                x, packed, jnp.float32(1), zero_point=zero_point, columns=columns
            )
        )  # fmt: skip

    expected = (x.astype(np.int64) - zero_point) @ weight.astype(np.int64)
    for variant, got in run(x, weight).items():
        np.testing.assert_array_equal(got, expected, err_msg=variant)


def test_sums_alone_are_exact_beyond_what_a_float_holds():
    x, weight = int8_values(0, (20, 3000)), int8_values(1, (3000, 70))
    x[0], weight[:, 0] = 127, 127
    got = native.dot_sums(jnp.asarray(x), native.pack_dot(jnp.asarray(weight)), 70)
    assert got.dtype == jnp.int32
    assert got[0, 0] == 127 * 127 * 3000 > 2**25
    np.testing.assert_array_equal(got, x.astype(np.int64) @ weight.astype(np.int64))


def test_leading_axes_and_a_residual():
    x, weight = int8_values(0, (2, 3, 5, 40)), int8_values(1, (40, 24))
    residual = np.random.default_rng(0).normal(size=(2, 3, 5, 24)).astype(np.float32)
    got = native.dot(
        jnp.asarray(x), jnp.asarray(weight), jnp.float32(0.5), jnp.ones(24, jnp.float32),
        residual=native.Residual(jnp.asarray(residual)),
    )  # fmt: skip
    sums = x.astype(np.int64) @ weight.astype(np.int64)
    np.testing.assert_array_equal(got, (sums * 0.5 + 1).astype(np.float32) + residual)


def test_large():
    x, weight = int8_values(0, (300, 1000)), int8_values(1, (1000, 517))
    got = native.dot(jnp.asarray(x), jnp.asarray(weight), jnp.float32(1))
    np.testing.assert_array_equal(got, x.astype(np.int64) @ weight.astype(np.int64))


def test_a_weight_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit x"):
        native.dot(jnp.ones((2, 5), jnp.int8), jnp.ones((4, 3), jnp.int8), jnp.float32(1))
