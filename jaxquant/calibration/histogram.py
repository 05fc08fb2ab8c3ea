"""Streaming histogram of |x| for one tensor: fixed memory, exact, and independent of batch order.

The state is a pytree and the functions are pure: `init() -> state`, `merge(a, b) -> state`; that of
a batch is counted by `jaxquant.calibration.counting`.  Bin j of 2048 covers [j, j + 1) *
2**(exponent - 11).  The range [0, 2**exponent) is always the smallest power of two above the
largest |x| so far; when it grows, 2**k old bins become one.  Ranges that are powers of two nest
exactly, so the final counts are the same bits as those of one pass over all the data, however it
was split and ordered.

Counts are 64-bit, as two uint32 words, since JAX has no 64-bit integers by default and a million
samples overflow 32 bits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BINS = 2048
BIN_BITS = 11
# The smallest range; 2**(BIN_BITS - exponent), by which x is scaled, must be a normal float32.
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


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both data together; exact, associative and commutative.

    Example:
      >>> from jaxquant.calibration.counting import observe
      >>> a, b = observe(jnp.array([1.0])), observe(jnp.array([5.0, 7.0]))
      >>> int(merge(a, b).exponent), int(merge(a, b).count_lo)
      (3, 3)
    """
    # The larger range holds both; the other's bins are joined.
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
      >>> from jaxquant.calibration.counting import observe
      >>> counts, bin_width = to_numpy(observe(jnp.full(3, 0.75)))
      >>> int(counts.sum()), bin_width == 1 / 2048
      (3, True)
    """
    lo, hi = np.asarray(state.lo), np.asarray(state.hi)
    # Words as one number, which NumPy has.
    counts = (hi.astype(np.int64) << 32) + lo.astype(np.int64)
    return counts, 2.0 ** (int(state.exponent) - BIN_BITS)


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
        # Counts of a file are 64-bit: two words here.
        lo=jnp.asarray((counts & 0xFFFFFFFF).astype(np.uint32)),
        hi=jnp.asarray((counts >> 32).astype(np.uint32)),
        exponent=jnp.asarray(math.frexp(bin_width)[1] - 1 + BIN_BITS, jnp.int32),
        min=jnp.asarray(low, jnp.float32),
        max=jnp.asarray(high, jnp.float32),
        abs_max=jnp.asarray(abs_max, jnp.float32),
        count_lo=jnp.asarray(np.uint32(total & 0xFFFFFFFF)),
        count_hi=jnp.asarray(np.uint32(total >> 32)),
        first_bad=jnp.full((), -1, jnp.int32),
    )


def abs_max_of(low: jax.Array, high: jax.Array, good: jax.Array) -> jax.Array:
    """The largest |x| of what has these extremes; 0 for no values and for bad ones."""
    return jnp.where(good, jnp.maximum(jnp.maximum(-low, high), 0.0), 0.0)


def exponent_above(x: jax.Array) -> jax.Array:
    """The least e with x < 2**e, from the bits of a finite x >= 0; at least MIN_EXPONENT."""
    # The exponent of the bits is that of the power of two below; one more is above.
    biased = lax.bitcast_convert_type(x, jnp.int32) >> 23
    return jnp.maximum(biased - 126, MIN_EXPONENT)


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2**exponent as float32, for exponents -126 ... 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _widened(state: Histogram, exponent: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The counts over the range of a larger exponent: 2**k neighbours become one bin."""
    # From a shift of 11 on all old bins are bin 0.
    shift = jnp.minimum(exponent - state.exponent, BIN_BITS)
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
    # The low word wrapped if it came out smaller.
    carry = (lo < a[0]).astype(jnp.uint32)
    return lo, a[1] + b[1] + carry


def _first(a: jax.Array, b: jax.Array) -> jax.Array:
    """The smaller of two batch indices, where -1 is none."""
    return jnp.where(a < 0, b, jnp.where(b < 0, a, jnp.minimum(a, b)))
