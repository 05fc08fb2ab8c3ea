"""Count batches into the histograms of many tensors at once.

What depends on the shape of a tensor, the counts of its |x| (`count_all`), is apart from what does
not (`fold`), so that the latter is compiled once for a number of tensors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxquant.calibration.histogram import (
    BIN_BITS,
    BINS,
    Histogram,
    abs_max_of,
    exponent_above,
    merge,
    power_of_two,
)
from jaxquant.jax_shim import compilation
from jaxquant.jax_shim.extremes import largest, least

# float32 of any shape -> uint32 [2048], the counts of |x| over the range of `Histogram.exponent`,
# and float32 [2], the least and the largest x; one of these is not finite where a value is not.
Counter: TypeAlias = Callable[[jax.Array], Sequence[jax.Array]]


def update(state: Histogram, x: jax.Array, batch_index: jax.Array | int = 0) -> Histogram:
    """What has been seen with one more batch: `merge(state, observe(x, batch_index))`.

    With many tensors, stack their states and count all at once: `fold(states, count_all(xs))`.

    Args: `state` is what has been seen so far; the others are as for `observe`.

    Returns:
      The new state.

    Example:
      >>> from jaxquant.calibration.histogram import init
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
    low, high = least(x, initial=jnp.inf), largest(x, initial=-jnp.inf)
    # Masking single values that are bad instead would double the time of it all.
    good = (low > -jnp.inf) & (high < jnp.inf)
    exponent = exponent_above(abs_max_of(low, high, good))
    # Exact: a power of two, so that in a good batch 0 <= scaled < 2048.
    # The barrier keeps XLA from computing the scale anew for each value.
    scaled = jnp.abs(x) * lax.optimization_barrier(power_of_two(BIN_BITS - exponent))
    # Whatever is beyond goes to one bin more, which is cut off: NaN and infinity too.
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
      >>> from jaxquant.calibration.histogram import to_numpy
      >>> counts, bin_width = to_numpy(observe(jnp.array([0.0, -1.5, 3.0])))
      >>> counts.nonzero()[0] * bin_width
      array([0. , 1.5, 3. ])
    """
    # One batch of one tensor, as `fold` has it for many.
    return _of_batch(*_in_two_words(*_counted(x, count), jnp.uint32(x.size)), batch_index)


class Counts(NamedTuple):
    """What is counted of one batch of T tensors, along a leading axis.

    Attributes:
      counts: uint32 [T, 2, 2048], the low and the high words, over the range of each batch.
      extremes: float32 [T, 2], the least and the largest x, not finite where a value is not.
      sizes: uint32 [T, 2], how many values there are, low and high word: in one array fewer than
        2**31, in all the steps of a loop perhaps more.
    """

    counts: jax.Array
    extremes: jax.Array
    sizes: jax.Array


def count_all(
    xs: Sequence[jax.Array],
    count: Counter = portable_counts,
    real: Sequence[jax.Array | None] | None = None,
) -> Counts:
    """The part of the histograms of one batch of several tensors that depends on their shapes.

    `fold` does the rest.

    Args:
      xs: the tensors.
      count: how; see `Counter`.
      real: which entries of each count, bool of a shape that is broadcast to the tensor's, or None
        for all of them; None where all of all do.

    Example:
      >>> count_all([jnp.ones(2), jnp.zeros((3, 4))]).sizes.tolist()
      [[2, 0], [12, 0]]
      >>> count_all([jnp.array([1.0, 5.0])], real=[jnp.array([True, False])]).extremes.tolist()
      [[1.0, 1.0]]
    """
    if real is None or all(each is None for each in real):
        # Stacked, so that what follows is compiled for a number of tensors, not for their shapes.
        counts, extremes = (jnp.stack(each) for each in zip(*(_counted(x, count) for x in xs)))
        return _in_two_words(counts, extremes, jnp.asarray([x.size for x in xs], jnp.uint32))
    parts = [_real_counts(x, each, count) for x, each in zip(xs, real, strict=True)]
    return Counts(*map(jnp.stack, zip(*parts, strict=True)))


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
      >>> from jaxquant.calibration.histogram import init
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
        # Another buffer than the donated one, which the caller reads after the next batch was
        # added.
        return merged, merged.first_bad + 0

    folding = jax.vmap(one, (0, 0, 0, 0, None))
    options = compilation.quick_compilation()
    return jax.jit(folding, donate_argnums=0, compiler_options=options)


def joined(states: Histogram, seen: Counts) -> Histogram:
    """The states of T tensors with what was counted in one step of a loop, inside a program."""

    def one(state: Histogram, *seen: jax.Array) -> Histogram:
        counts, extremes, sizes = seen
        return merge(state, _of_batch(counts, extremes, sizes, 0))

    return jax.vmap(one)(states, *seen)


def as_counts(states: Histogram) -> Counts:
    """The states of T tensors over the steps of a loop as what is counted of one batch.

    Example:
      >>> from jaxquant.calibration.histogram import init
      >>> states = jax.tree.map(lambda x: x[None], init())
      >>> seen = as_counts(joined(states, count_all([jnp.ones(3)])))
      >>> seen.extremes.tolist(), seen.sizes.tolist()
      ([[1.0, 1.0]], [[3, 0]])
    """
    extremes = jnp.stack([states.min, states.max], axis=-1)
    # Bad is bad in any step: what follows sees NaN and leaves the batch out.
    bad = (states.first_bad >= 0)[:, None]
    return Counts(
        jnp.stack([states.lo, states.hi], axis=1),
        jnp.where(bad, jnp.nan, extremes),
        jnp.stack([states.count_lo, states.count_hi], axis=1),
    )


def _counted(x: jax.Array, count: Counter) -> tuple[jax.Array, jax.Array]:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"a histogram counts floating-point values; got {x.dtype}{list(x.shape)}")
    # A word of counts holds fewer than 2**32, and indices of XLA fewer than 2**31.
    if x.size >= 2**31:
        raise ValueError(f"a batch must have fewer than 2**31 values; got shape {list(x.shape)}")
    counts, extremes = count(x.astype(jnp.float32))
    return counts, extremes


def _real_counts(x: jax.Array, real: jax.Array | None, count: Counter) -> Counts:
    """What is counted of the entries of one tensor that are real; see `count_all`.

    In the place of the others the largest real one is counted, which changes no extreme, and its
    bin is lessened by as many.
    """
    if real is None:
        return _in_two_words(*_counted(x, count), jnp.uint32(x.size))
    real, lowest = jnp.broadcast_to(real, x.shape), float(np.finfo(np.float32).min)
    number = jnp.sum(real, dtype=jnp.uint32)
    x = x.astype(jnp.float32)
    # Entries of padding are counted as the largest real one, which cannot widen the range, and that
    # many are taken out of its bin again.
    top = largest(jnp.where(real, x, lowest), initial=lowest)
    top = jnp.where(number > 0, top, jnp.float32(0))
    counts, extremes = _counted(jnp.where(real, x, top), count)
    low, high = extremes
    good = (low > -jnp.inf) & (high < jnp.inf)
    exponent = exponent_above(abs_max_of(low, high, good))
    place = jnp.where(good, jnp.abs(top) * power_of_two(BIN_BITS - exponent), 0).astype(jnp.int32)
    # Modulo 2**32 this takes away as many as were counted too much.
    counts = counts.at[place].add(number - jnp.uint32(x.size), mode="drop")
    empty = jnp.asarray([jnp.inf, -jnp.inf], jnp.float32)
    return _in_two_words(counts, jnp.where(number > 0, extremes, empty), number)


def _in_two_words(counts: jax.Array, extremes: jax.Array, sizes: jax.Array) -> Counts:
    """Counts [..., 2048] and sizes [...] of tensors of fewer than 2**32 values."""
    return Counts(
        jnp.stack([counts, jnp.zeros_like(counts)], axis=-2),
        extremes,
        jnp.stack([sizes, jnp.zeros_like(sizes)], axis=-1),
    )


def _of_batch(
    counts: jax.Array, extremes: jax.Array, sizes: jax.Array, batch_index: jax.Array | int
) -> Histogram:
    """The state of what was counted of one tensor; see `Counts`, without T."""
    low, high = jnp.where(extremes == 0, 0.0, extremes)  # which zero comes first does not matter
    good = (low > -jnp.inf) & (high < jnp.inf)  # NaN passes through both
    abs_max = abs_max_of(low, high, good)
    # A batch with NaN leaves the state as it was, so that what follows can be read.
    lo, hi = jnp.where(good, counts, jnp.uint32(0))
    count_lo, count_hi = jnp.where(good, sizes, jnp.uint32(0))
    return Histogram(
        lo=lo,
        hi=hi,
        exponent=exponent_above(abs_max),
        min=jnp.where(good, low, jnp.inf),
        max=jnp.where(good, high, -jnp.inf),
        abs_max=abs_max,
        count_lo=count_lo,
        count_hi=count_hi,
        first_bad=jnp.where(good, -1, jnp.asarray(batch_index, jnp.int32)),
    )
