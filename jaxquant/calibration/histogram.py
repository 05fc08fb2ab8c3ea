"""Streaming histogram of |x| for one tensor: fixed memory, exact, and independent of batch order.

The state is a pytree and the functions are pure: `init() -> state`, `update(state, x, batch_index)
-> state`, `merge(a, b) -> state`.  Bin j of 2048 covers [j, j + 1) * 2**(exponent - 11).  The range
[0, 2**exponent) is always the smallest power of two above the largest |x| so far; when it grows,
2**k old bins become one.  Ranges that are powers of two nest exactly, so the final counts are the
same bits as those of one pass over all the data, however it was split and ordered.

Counts are 64-bit, as two uint32 words, since JAX has no 64-bit integers by default and a million
samples overflow 32 bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxquant.jax_shim import compilation

# float32 of any shape -> uint32 [2048], the counts of |x| over the range of `Histogram.exponent`,
# and float32 [2], the least and the largest x; one of these is not finite where a value is not.
Counter: TypeAlias = Callable[[jax.Array], Sequence[jax.Array]]

BINS = 2048
_BIN_BITS = 11
# The smallest range; 2**(_BIN_BITS - exponent), by which x is scaled, must be a normal float32.
MIN_EXPONENT = -115


class Histogram(NamedTuple):
    """What has been seen of one tensor.

    Attributes:
      lo: uint32 [2048], the low words of the counts of |x|.
      hi: uint32 [2048], their high words.
      exponent: int32 [], the range is [0, 2**exponent).
      min: float32 [], the least x (not |x|); +inf before any.
      max: float32 [], the largest x; -inf before any.
      abs_max: float32 [], the largest |x|; 0 before any.
      count_lo: uint32 [], low word of the number of values counted.
      count_hi: uint32 [], its high word.
      first_bad: int32 [], the first batch with a NaN or infinity; -1 for none.
    """

    lo: jax.Array
    hi: jax.Array
    exponent: jax.Array
    min: jax.Array
    max: jax.Array
    abs_max: jax.Array
    count_lo: jax.Array
    count_hi: jax.Array
    first_bad: jax.Array


def init() -> Histogram:
    """The state before any data.

    Example:
      >>> init().lo.shape
      (2048,)
    """
    # Every field has its own buffer, so that the state can be donated to a compiled step; they come
    # from NumPy, so that nothing is compiled.
    put = jax.device_put
    return Histogram(
        lo=put(np.zeros(BINS, np.uint32)),
        hi=put(np.zeros(BINS, np.uint32)),
        exponent=put(np.int32(MIN_EXPONENT)),
        min=put(np.float32(np.inf)),
        max=put(np.float32(-np.inf)),
        abs_max=put(np.float32(0)),
        count_lo=put(np.uint32(0)),
        count_hi=put(np.uint32(0)),
        first_bad=put(np.int32(-1)),
    )


def update(state: Histogram, x: jax.Array, batch_index: jax.Array | int = 0) -> Histogram:
    """What has been seen with one more batch: `merge(state, observe(x, batch_index))`.

    With many tensors, stack their states and count all at once: `fold(states, count_all(xs))`.

    Args: `state` is what has been seen so far; the others are as for `observe`.

    Returns:
      The new state.

    Example:
      >>> state = update(update(init(), jnp.array([0.0, -1.5])), jnp.array([3.0]))
      >>> float(state.min), float(state.max), float(state.abs_max)
      (-1.5, 3.0, 3.0)
    """
    return merge(state, observe(x, batch_index))


def portable_counts(x: jax.Array) -> list[jax.Array]:
    """A `Counter` of operations that XLA has everywhere.

    One scatter-add: on CPU the fastest of nine forms that experiments/benchmarks/histogram.py
    times, but for splits that gain little.  Not measured on GPU or TPU.
    """
    x = x.reshape(-1)
    low, high = jnp.min(x, initial=jnp.inf), jnp.max(x, initial=-jnp.inf)
    # Masking single values that are bad instead would double the time of it all.
    good = (low > -jnp.inf) & (high < jnp.inf)
    exponent = _exponent_above(_abs_max(low, high, good))
    # Exact: a power of two, so that in a good batch 0 <= scaled < 2048.
    # The barrier keeps XLA from computing the scale anew for each value.
    scaled = jnp.abs(x) * lax.optimization_barrier(_power_of_two(_BIN_BITS - exponent))
    bins = jnp.where(scaled < BINS, scaled, float(BINS)).astype(jnp.int32)
    counts = jnp.zeros(BINS + 1, jnp.uint32)
    counts = counts.at[bins].add(jnp.uint32(1), mode="promise_in_bounds")[:BINS]
    return [counts, jnp.stack([low, high])]


def observe(
    x: jax.Array, batch_index: jax.Array | int = 0, count: Counter = portable_counts
) -> Histogram:
    """The histogram of one batch.

    A batch with a NaN or infinity is left out as a whole, and `first_bad` tells which was first.

    Args:
      x: any shape (also empty) of fewer than 2**31 values, any float dtype; counted as float32.
      batch_index: [] which batch this is, for `first_bad`.
      count: how; every counter gives the same state.

    Returns:
      The state that holds this batch alone.

    Raises:
      ValueError: `x` is not of a float dtype or is too large.

    Example:
      >>> counts, bin_width = to_numpy(observe(jnp.array([0.0, -1.5, 3.0])))
      >>> counts.nonzero()[0] * bin_width
      array([0. , 1.5, 3. ])
    """
    return _of_batch(*_counted(x, count), jnp.uint32(x.size), batch_index)


class Counts(NamedTuple):
    """What is counted of one batch of T tensors, along a leading axis.

    Attributes:
      counts: uint32 [T, 2048], over the range of each batch.
      extremes: float32 [T, 2], the least and the largest x, not finite where a value is not.
      sizes: uint32 [T], how many values there are.
    """

    counts: jax.Array
    extremes: jax.Array
    sizes: jax.Array


def count_all(xs: Sequence[jax.Array], count: Counter = portable_counts) -> Counts:
    """The part of the histograms of one batch of several tensors that depends on their shapes.

    `fold` does the rest.

    Example:
      >>> count_all([jnp.ones(2), jnp.zeros((3, 4))]).sizes.tolist()
      [2, 12]
    """
    counts, extremes = (jnp.stack(each) for each in zip(*(_counted(x, count) for x in xs)))
    return Counts(counts, extremes, jnp.asarray([x.size for x in xs], jnp.uint32))


def fold(states: Histogram, seen: Counts, batch_index: ArrayLike) -> tuple[Histogram, jax.Array]:
    """Add one batch to the states of T tensors, stacked along a leading axis.

    A program of its own: it is compiled once for a number of tensors, not once for every model and
    every input shape.

    Args:
      states: what has been seen so far; donated, so they cannot be read again.
      seen: what `count_all` gives of the batch.
      batch_index: [] which batch this is, for `first_bad`.

    Returns:
      The new states, and their `first_bad` once more, which is not donated with them.

    Example:
      >>> states = jax.tree.map(lambda x: x[None], init())
      >>> states, first_bad = fold(states, count_all([jnp.ones(3)]), 0)
      >>> states.count_lo.tolist(), first_bad.tolist()
      ([3], [-1])
    """
    return _compiled_fold()(states, *seen, batch_index)


@functools.cache
def _compiled_fold() -> Callable[..., tuple[Histogram, jax.Array]]:
    def one(state: Histogram, *seen: jax.Array) -> tuple[Histogram, jax.Array]:
        merged = merge(state, _of_batch(*seen))
        return merged, merged.first_bad + 0

    folding = jax.vmap(one, (0, 0, 0, 0, None))
    options = compilation.quick_compilation()
    return jax.jit(folding, donate_argnums=0, compiler_options=options)


def joined(states: Histogram, seen: Counts) -> Histogram:
    """The states of T tensors with what was counted in one step of a loop, inside a program."""

    def one(state: Histogram, *seen: jax.Array) -> Histogram:
        counts, extremes, size = seen
        return merge(state, _of_batch(counts, extremes, size, 0))

    return jax.vmap(one)(states, *seen)


def as_counts(states: Histogram) -> Counts:
    """The states of T tensors over the steps of a loop as what is counted of one batch.

    Example:
      >>> states = jax.tree.map(lambda x: x[None], init())
      >>> seen = as_counts(joined(states, count_all([jnp.ones(3)])))
      >>> seen.extremes.tolist(), seen.sizes.tolist()
      ([[1.0, 1.0]], [3])
    """
    extremes = jnp.stack([states.min, states.max], axis=-1)
    bad = (states.first_bad >= 0)[:, None]
    return Counts(states.lo, jnp.where(bad, jnp.nan, extremes), states.count_lo)


def _counted(x: jax.Array, count: Counter) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"a histogram counts floating-point values; got {x.dtype}{list(x.shape)}")
    if x.size >= 2**31:
        raise ValueError(f"a batch must have fewer than 2**31 values; got shape {list(x.shape)}")
    counts, extremes = count(x.astype(jnp.float32))
    return counts, extremes


def _of_batch(
    counts: jax.Array, extremes: jax.Array, size: ArrayLike, batch_index: jax.Array | int
) -> Histogram:
    low, high = jnp.where(extremes == 0, 0.0, extremes)  # which zero comes first does not matter
    good = (low > -jnp.inf) & (high < jnp.inf)  # NaN passes through both
    abs_max = _abs_max(low, high, good)
    return Histogram(
        lo=jnp.where(good, counts, jnp.uint32(0)),
        hi=jnp.zeros(BINS, jnp.uint32),
        exponent=_exponent_above(abs_max),
        min=jnp.where(good, low, jnp.inf),
        max=jnp.where(good, high, -jnp.inf),
        abs_max=abs_max,
        count_lo=jnp.where(good, size, jnp.uint32(0)),
        count_hi=jnp.zeros((), jnp.uint32),
        first_bad=jnp.where(good, -1, jnp.asarray(batch_index, jnp.int32)),
    )


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both data together; exact, associative and commutative.

    Example:
      >>> a, b = update(init(), jnp.array([1.0])), update(init(), jnp.array([5.0, 7.0]))
      >>> int(merge(a, b).exponent), int(merge(a, b).count_lo)
      (3, 3)
    """
    exponent = jnp.maximum(a.exponent, b.exponent)
    lo, hi = _add64(_widened(a, exponent), _widened(b, exponent))
    count_lo, count_hi = _add64((a.count_lo, a.count_hi), (b.count_lo, b.count_hi))
    return Histogram(
        lo=lo,
        hi=hi,
        exponent=exponent,
        min=jnp.minimum(a.min, b.min),
        max=jnp.maximum(a.max, b.max),
        abs_max=jnp.maximum(a.abs_max, b.abs_max),
        count_lo=count_lo,
        count_hi=count_hi,
        first_bad=_first(a.first_bad, b.first_bad),
    )


def to_numpy(state: Histogram) -> tuple[np.ndarray, float]:
    """The histogram as the threshold searches take it.

    Args:
      state: one tensor's.

    Returns:
      counts [2048] int64 and the bin width; bin j covers [j, j + 1) * bin width.

    Example:
      >>> counts, bin_width = to_numpy(update(init(), jnp.full(3, 0.75)))
      >>> int(counts.sum()), bin_width == 1 / 2048
      (3, True)
    """
    lo, hi = np.asarray(state.lo), np.asarray(state.hi)
    counts = (hi.astype(np.int64) << 32) + lo.astype(np.int64)
    return counts, 2.0 ** (int(state.exponent) - _BIN_BITS)


def from_numpy(
    counts: np.ndarray, bin_width: float, low: float, high: float, abs_max: float
) -> Histogram:
    """The state of which `to_numpy` gives these counts and this bin width.

    Args:
      counts: [2048] int64.
      bin_width: a power of two.
      low, high, abs_max: the extremes, as in `Histogram`.

    Example:
      >>> state = from_numpy(np.ones(BINS, np.int64), 0.5, -1.0, 1023.75, 1023.75)
      >>> int(state.exponent), int(state.count_lo)
      (10, 2048)
    """
    total = int(counts.sum())
    return Histogram(
        lo=jnp.asarray((counts & 0xFFFFFFFF).astype(np.uint32)),
        hi=jnp.asarray((counts >> 32).astype(np.uint32)),
        exponent=jnp.asarray(math.frexp(bin_width)[1] - 1 + _BIN_BITS, jnp.int32),
        min=jnp.asarray(low, jnp.float32),
        max=jnp.asarray(high, jnp.float32),
        abs_max=jnp.asarray(abs_max, jnp.float32),
        count_lo=jnp.asarray(np.uint32(total & 0xFFFFFFFF)),
        count_hi=jnp.asarray(np.uint32(total >> 32)),
        first_bad=jnp.full((), -1, jnp.int32),
    )


def _abs_max(low: jax.Array, high: jax.Array, good: jax.Array) -> jax.Array:
    """Of the extremes; 0 for no values and for bad ones."""
    return jnp.where(good, jnp.maximum(jnp.maximum(-low, high), 0.0), 0.0)


def _exponent_above(x: jax.Array) -> jax.Array:
    """The least e with x < 2**e, from the bits of a finite x >= 0; at least MIN_EXPONENT."""
    biased = lax.bitcast_convert_type(x, jnp.int32) >> 23
    return jnp.maximum(biased - 126, MIN_EXPONENT)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent as float32, for exponents -126 ... 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _widened(state: Histogram, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The counts over the range of a larger exponent: 2**k neighbours become one bin."""
    shift = jnp.minimum(exponent - state.exponent, _BIN_BITS)
    to = jnp.arange(BINS, dtype=jnp.int32) >> shift
    # Sums of 2048 16-bit digits fit 32 bits; the carries are settled afterwards.
    digits = jnp.stack(
        [state.lo & 0xFFFF, state.lo >> 16, state.hi & 0xFFFF, state.hi >> 16], axis=1
    )
    sums = jnp.zeros_like(digits).at[to].add(digits, mode="promise_in_bounds")
    d0, d1, d2, d3 = (sums[:, i] for i in range(4))
    zero = jnp.zeros_like(d0)
    lo, hi = _add64((d0, zero), (d1 << 16, d1 >> 16))
    return _add64((lo, hi), (zero, d2 + (d3 << 16)))


def _add64(
    a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The sum of two unsigned 64-bit numbers, each (low word, high word)."""
    lo = a[0] + b[0]
    carry = (lo < a[0]).astype(jnp.uint32)
    return lo, a[1] + b[1] + carry


def _first(a: jax.Array, b: jax.Array) -> jax.Array:
    """The smaller of two batch indices, where -1 is none."""
    return jnp.where(a < 0, b, jnp.where(b < 0, a, jnp.minimum(a, b)))
