"""The streaming histogram: exact, and the same bits however the data was split and ordered."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxquant.calibration import counting
from jaxquant.calibration import histogram as hg

pytestmark = pytest.mark.optimized

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=15)
update = jax.jit(counting.update)
merge = jax.jit(hg.merge)


def pad(values: list[float], size: int = 8) -> list[np.ndarray]:
    """Batches of one size (one compilation), the last of them ragged."""
    x = np.array(values, np.float32)
    return [x[i : i + size] for i in range(0, len(x), size)]


def of(batches) -> hg.Histogram:
    return functools.reduce(
        lambda s, ib: update(s, jnp.asarray(ib[1]), ib[0]), enumerate(batches), hg.init()
    )


def reference(x: np.ndarray) -> tuple[np.ndarray, float]:
    """NumPy's histogram of the finite |x| over the smallest power-of-two range above them."""
    x = np.abs(np.asarray(x, np.float64).ravel())
    x = x[np.isfinite(x)]
    largest = x.max(initial=0.0)
    exponent = max(math.frexp(largest)[1] if largest else -1000, hg.MIN_EXPONENT)
    return np.histogram(x, hg.BINS, (0.0, 2.0**exponent))[0], 2.0 ** (exponent - 11)


def assert_same(a: hg.Histogram, b: hg.Histogram) -> None:
    for name, x, y in zip(a._fields, a, b):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def counted(state: hg.Histogram) -> int:
    return (int(state.count_hi) << 32) + int(state.count_lo)


def with_counts(counts: np.ndarray, exponent: int) -> hg.Histogram:
    """A state with the given 64-bit counts."""
    total = int(counts.sum())
    return hg.init()._replace(
        lo=jnp.asarray(counts & 0xFFFFFFFF, jnp.uint32),
        hi=jnp.asarray(counts >> 32, jnp.uint32),
        exponent=jnp.asarray(exponent, jnp.int32),
        count_lo=jnp.asarray(total & 0xFFFFFFFF, jnp.uint32),
        count_hi=jnp.asarray(total >> 32, jnp.uint32),
    )


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
values = st.lists(st.one_of(floats, st.floats(-8, 8, width=32, allow_subnormal=False)), max_size=40)


@settings
@hypothesis.given(values)
def test_matches_numpy(x):
    counts, bin_width = hg.to_numpy(of(pad(x)))
    want, want_width = reference(np.array(x, np.float32))
    np.testing.assert_array_equal(counts, want)
    assert bin_width == want_width


@settings
@hypothesis.given(values, st.randoms(use_true_random=False), st.integers(0, 40))
def test_order_and_split_do_not_matter(x, random, cut):
    whole = of(pad(x))
    shuffled = list(x)
    random.shuffle(shuffled)
    assert_same(whole, of(pad(shuffled)))
    assert_same(whole, merge(of(pad(shuffled[:cut])), of(pad(shuffled[cut:]))))


@settings
@hypothesis.given(
    st.lists(
        st.tuples(st.integers(0, 2**32 - 1), st.integers(hg.MIN_EXPONENT, 128)),
        min_size=3,
        max_size=3,
    )
)
def test_merge_is_exact_and_associative(parts):
    counts = [np.random.default_rng(seed).integers(0, 2**50, hg.BINS) for seed, _ in parts]
    a, b, c = (with_counts(n, exponent) for n, (_, exponent) in zip(counts, parts))
    left, right = merge(merge(a, b), c), merge(a, merge(c, b))
    assert_same(left, right)
    want = np.zeros(hg.BINS, np.int64)
    for n, (_, exponent) in zip(counts, parts):
        shift = min(int(left.exponent) - exponent, 11)
        want[: hg.BINS >> shift] += n.reshape(-1, 1 << shift).sum(1)
    np.testing.assert_array_equal(hg.to_numpy(left)[0], want)
    assert counted(left) == want.sum()
    assert_same(merge(a, hg.init()._replace(exponent=a.exponent)), a)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (3, 0, 2), (2, 3, 4, 5)])
def test_dtypes_and_shapes(dtype, shape, rng):
    x = rng.standard_normal(shape).astype(dtype)
    state = counting.update(hg.init(), jnp.asarray(x))
    counts, bin_width = hg.to_numpy(state)
    want, want_width = reference(x)
    np.testing.assert_array_equal(counts, want)
    assert bin_width == want_width
    assert counted(state) == x.size
    as_float = x.astype(np.float32)
    assert float(state.min) == as_float.min(initial=np.inf)
    assert float(state.max) == as_float.max(initial=-np.inf)
    assert float(state.abs_max) == np.abs(as_float).max(initial=0)


def test_larger_than_16_bits_of_one_bin(rng):
    x = np.maximum(rng.standard_normal(200_000), 0).astype(np.float32)
    counts, bin_width = hg.to_numpy(counting.observe(jnp.asarray(x)))
    want, want_width = reference(x)
    np.testing.assert_array_equal(counts, want)
    assert bin_width == want_width


@pytest.mark.parametrize(
    ("x", "exponent"),
    [
        (1.0, 1),
        (np.nextafter(np.float32(1), np.float32(0)), 0),
        (0.5, 0),
        (2.0**-115, -114),
        (1e-38, hg.MIN_EXPONENT),
        (1e-42, hg.MIN_EXPONENT),  # subnormal
        (0.0, hg.MIN_EXPONENT),
        (-0.0, hg.MIN_EXPONENT),
        (np.finfo(np.float32).max, 128),
        (-(2.0**127), 128),
    ],
)
def test_range_is_the_least_power_of_two_above(x, exponent):
    state = update(hg.init(), jnp.asarray([x], jnp.float32))
    assert int(state.exponent) == exponent
    counts, bin_width = hg.to_numpy(state)
    assert bin_width == 2.0 ** (exponent - 11)
    assert counts.sum() == 1
    j = int(counts.argmax())
    assert j * bin_width <= abs(float(x)) < (j + 1) * bin_width
    if exponent > hg.MIN_EXPONENT:
        assert j >= hg.BINS // 2


def test_counts_carry_into_the_high_word():
    state = with_counts(np.full(hg.BINS, 2**32 - 1), 1)
    for _ in range(2):
        state = update(state, jnp.full(3, 1.5, jnp.float32))
    assert hg.to_numpy(state)[0][1536] == 2**32 + 5
    assert counted(state) == hg.BINS * (2**32 - 1) + 6
    state = update(state, jnp.asarray([1e30], jnp.float32))
    assert hg.to_numpy(state)[0][0] == hg.BINS * (2**32 - 1) + 6


def test_what_the_steps_of_a_loop_count_in_one_batch_keeps_its_high_words():
    seen = jnp.float32(1.5)
    state = with_counts(np.full(hg.BINS, 2**32 + 7), 1)._replace(min=-seen, max=seen, abs_max=seen)
    states, empty = (jax.tree.map(lambda x: x[None], each) for each in (state, hg.init()))
    folded, _ = counting.fold(empty, counting.as_counts(states), 0)
    again, _ = counting.fold(folded, counting.count_all([jnp.ones(3)]), 1)
    got = jax.tree.map(lambda x: x[0], again)
    assert counted(got) == hg.BINS * (2**32 + 7) + 3
    assert hg.to_numpy(got)[0][[1023, 1024, 1025]].tolist() == [2**32 + 7, 2**32 + 10, 2**32 + 7]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_batch_with_a_bad_value_is_left_out_and_named(bad):
    clean, dirty = np.array([1.0, -3.0, 0.5], np.float32), np.array([1, bad, -3, 0.5, bad], "f4")
    want = of([clean, clean])
    got = of([clean, dirty, dirty, clean])
    assert int(got.first_bad) == 1
    assert_same(got._replace(first_bad=want.first_bad), want)
    other = update(hg.init(), jnp.asarray(dirty), 0)
    assert int(merge(got, other).first_bad) == int(merge(other, got).first_bad) == 0
    assert int(merge(want, got).first_bad) == int(merge(got, want).first_bad) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_batch_of_bad_values_alone(bad):
    state = of([np.full(4, bad, np.float32)])
    assert_same(state._replace(first_bad=hg.init().first_bad), hg.init())
    assert int(state.first_bad) == 0


def test_many_tensors_under_vmap_and_scan():
    x = jax.random.normal(jax.random.key(0), (4, 3, 5))  # batches, tensors, values
    start = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), hg.init())

    def step(states, batch):
        return jax.vmap(hg.merge)(states, jax.vmap(counting.observe)(batch)), None

    states, _ = jax.jit(lambda x: jax.lax.scan(step, start, x))(x)
    for i in range(3):
        want = of(list(np.asarray(x[:, i])))
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], states), want)


def test_same_with_64_bit_types():
    x = np.array([1.0, -2.5, 1e-3, 0.0], np.float32)
    want = counting.update(hg.init(), jnp.asarray(x))
    with jax.enable_x64(True):
        got = counting.update(hg.init(), jnp.asarray(x, jnp.float64))
    assert all(leaf.dtype.itemsize == 4 for leaf in got)
    assert_same(got, want)


def test_one_compilation_and_no_aliased_buffers():
    traces = []

    def update(*given):
        traces.append(given)
        return counting.update(*given)

    step = jax.jit(update, donate_argnums=0)
    state = hg.init()
    for i in range(3):
        state = step(state, jnp.ones(4), i)
    assert len(traces) == 1
    assert counted(state) == 12


@pytest.mark.parametrize("x", [jnp.ones(3, jnp.int32), jnp.ones(3, bool)])
def test_refuses_other_dtypes(x):
    with pytest.raises(ValueError, match=rf"floating-point values; got {x.dtype}\[3\]"):
        counting.observe(x)


def test_refuses_a_batch_too_large_to_count():
    huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 values"):
        jax.eval_shape(counting.observe, huge)
