"""The native histogram counts what NumPy counts, and what XLA's form of it counts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant import native
from jaxquant.backends import operations
from jaxquant.calibration import counting
from jaxquant.calibration import histogram as hg
from tests.native.cases import needs_kernels

pytestmark = needs_kernels


def values(size: int, seed: int = 0) -> np.ndarray:
    """Zeros, repeats, subnormals and magnitudes far apart."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size) * np.exp2(rng.integers(-140, 20, size))
    return np.where(rng.random(size) < 0.4, 0.0, x).astype(np.float32)


def reference(x: np.ndarray) -> tuple[np.ndarray, list[float]]:
    magnitude = np.abs(x.astype(np.float64)).reshape(-1)
    exponent = max(int(np.frexp(magnitude.max(initial=0.0))[1]), hg.MIN_EXPONENT)
    counts = np.bincount(np.floor(np.ldexp(magnitude, 11 - exponent)).astype(int), minlength=2048)
    return counts, [x.min(initial=np.inf), x.max(initial=-np.inf)]


def observe():
    count = operations.counter(counting.portable_counts, hg.MIN_EXPONENT)
    return jax.jit(functools.partial(counting.observe, count=count))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000, 16384, 100_003])
@pytest.mark.parametrize("sign", [0, 1, -1])
def test_counts_and_extremes_are_those_of_numpy(size: int, sign: int):
    x = values(size)
    x = sign * np.abs(x) if sign else x
    counts, extremes = jax.jit(lambda x: native.histogram(x, hg.MIN_EXPONENT))(x)
    want, want_extremes = reference(x)
    np.testing.assert_array_equal(counts, want)
    np.testing.assert_array_equal(extremes, want_extremes)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 99_999, 100_002])
def test_a_value_that_is_not_finite_takes_all_with_it(bad: float, place: int):
    x = values(100_003)
    x[place] = bad
    counts, extremes = jax.jit(lambda x: native.histogram(x, hg.MIN_EXPONENT))(x)
    assert not np.asarray(counts).any()
    assert np.isnan(extremes).all()


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 4, 3), (40, 50, 60)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_both_forms_give_the_same_state(shape, dtype, rng):
    x = jnp.asarray(rng.normal(size=shape).astype(np.float32)).astype(dtype)
    assert "jaxquant_histogram" in observe().lower(x).as_text()
    assert "jaxquant_histogram" not in jax.jit(counting.observe).lower(x).as_text()
    for a, b in zip(observe()(x), jax.jit(counting.observe)(x), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_order_of_zeros_does_not_matter():
    x = np.where(np.arange(60_000) < 100, np.float32(-0.0), np.float32(0.0))
    for run in (observe(), jax.jit(counting.observe)):
        for values in (x, x[::-1].copy()):
            state = run(values)
            assert not np.signbit(state.min)
            assert not np.signbit(state.max)


def test_a_sharded_tensor_is_counted_where_its_parts_are():
    mesh = Mesh(np.array(jax.devices()), "d")
    x = values(8 * 500).reshape(8, 500)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("d")))
    assert "jaxquant_histogram" not in observe().lower(sharded).as_text()
    for a, b in zip(observe()(sharded), jax.jit(counting.observe)(x), strict=True):
        np.testing.assert_array_equal(a, b)
