"""How far an int8 tensor is from the float one: sums that add up over batches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.recover.shift import unit_of
from jaxquant.report.sqnr import decibel

_LEAST_DB, _MOST_DB = -20.0, 100.0  # what one sample counts for


class Moments(NamedTuple):
    """Sums over a float tensor y and its int8 counterpart ŷ, where y is finite.

    Σ y², Σ (y - ŷ)², Σ ŷ², Σ y ŷ; and of the samples (entries of the first axis) that are not all
    zero: the sum of each one's own SQNR in dB, within [-20, 100], and their number.  The first four
    are of y / `unit` and ŷ / `unit`.
    """

    signal: Any
    noise: Any
    power: Any
    cross: Any
    decibels: Any
    samples: Any
    unit: Any = 1.0

    def plus(self, other: Moments) -> Moments:
        """The sums of two tensors together, arrays of JAX, in the larger of their units."""
        unit = jnp.maximum(self.unit, other.unit)
        parts = [x.in_unit(unit) for x in (self, other)]
        sums: Moments = jax.tree.map(jnp.add, *parts)
        return sums._replace(unit=unit)

    def in_unit(self, unit: jax.Array) -> Moments:
        """The same in another unit, not below its own; one of 0 is of nothing seen."""
        # Nothing seen has a unit of 0, and 0 times anything is what it adds.
        ratio = self.unit / jnp.where(unit > 0, unit, 1)
        # Infinite noise stays: times a ratio of 0 it would be NaN.
        powers = (jnp.where(jnp.isinf(x), x, x * ratio**2) for x in self[:4])
        signal, noise, power, product = powers
        return Moments(signal, noise, power, product, self.decibels, self.samples, unit)

    def nothing(self) -> Moments:
        """The sums of no value: zeros of these shapes, the unit too."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self)

    @property
    def was_seen(self) -> bool:
        """Whether they are of any value; asked before they are widened."""
        return bool(self.unit > 0)

    def widened(self) -> Moments:
        """The sums with a unit of 1, in float64, which holds the square of any float32."""
        square = float(self.unit) ** 2
        powers = (float(x) * square for x in (self.signal, self.noise, self.power, self.cross))
        signal, noise, power, cross = powers
        counts = float(self.decibels), float(self.samples)
        return Moments(signal, noise, power, cross, *counts)

    @property
    def sqnr_db(self) -> float:
        """10 log10(Σ y² / Σ (y - ŷ)²)."""
        return decibel(float(self.signal), float(self.noise))

    @property
    def sample_db(self) -> float:
        """The mean of the samples' own SQNR in dB: what happens to an ordinary sample.

        A rare sample of large values has most of the energy, so `sqnr_db` may look well where all
        the others are lost.
        """
        return float(self.decibels) / float(self.samples) if self.samples > 0 else math.inf

    @property
    def cosine(self) -> float:
        """Σ y ŷ / √(Σ y² Σ ŷ²); 1 where both are all zero."""
        if self.signal == 0 and self.power == 0:
            return 1.0
        # Two roots and not one: the product of two sums of squares may overflow.
        norm = math.sqrt(float(self.signal)) * math.sqrt(float(self.power))
        return float(self.cross) / norm if norm > 0 and math.isfinite(norm) else 0.0


class Ends(NamedTuple):
    """The least and the largest value of each channel, float32 [C], before and after int8."""

    low: Any
    high: Any
    int8_low: Any
    int8_high: Any

    def plus(self, other: Ends) -> Ends:
        """The ends of two tensors together."""
        least, most = jnp.minimum, jnp.maximum
        return Ends(*(f(a, b) for f, a, b in zip((least, most) * 2, self, other, strict=True)))

    def nothing(self) -> Ends:
        """What no value shows, in arrays of these shapes."""
        ends = zip((jnp.inf, -jnp.inf) * 2, self, strict=True)
        return Ends(*(jnp.full(x.shape, end, x.dtype) for end, x in ends))

    @property
    def dead(self) -> int:
        """Channels that are constant in the float model."""
        return int(np.sum(self.low == self.high))

    @property
    def lost(self) -> int:
        """Channels that vary in the float model and not in int8."""
        return int(np.sum((self.low < self.high) & (self.int8_low == self.int8_high)))


class Clipping(NamedTuple):
    """A tensor on its grid.

    Its moments; how many values are clipped, of how many; how much of the noise they are, in the
    moments' unit; and the extremes of the values.
    """

    moments: Moments
    clipped: Any
    count: Any
    clipped_noise: Any
    low: Any
    high: Any

    def plus(self, other: Clipping) -> Clipping:
        """The clipping of two tensors together, arrays of JAX."""
        moments = self.moments.plus(other.moments)
        noises = [
            # As the moments: what is seen of nothing has a unit of 0.
            x.clipped_noise * (x.moments.unit / jnp.where(moments.unit > 0, moments.unit, 1)) ** 2
            for x in (self, other)
        ]
        return Clipping(
            moments,
            self.clipped + other.clipped,
            self.count + other.count,
            sum(noises),
            jnp.minimum(self.low, other.low),
            jnp.maximum(self.high, other.high),
        )

    def nothing(self) -> Clipping:
        """What no value shows, in arrays of these shapes."""
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self)
        low, high = (
            jnp.full(x.shape, end) for x, end in ((self.low, jnp.inf), (self.high, -jnp.inf))
        )
        return zeros._replace(low=low, high=high)

    def widened(self) -> Clipping:
        """The clipping with a unit of 1, in float64."""
        noise = float(self.clipped_noise) * float(self.moments.unit) ** 2
        return self._replace(moments=self.moments.widened(), clipped_noise=noise)


def widened(tree: Any) -> Any:
    """A pytree of NumPy arrays in float64, its moments with a unit of 1."""

    def wide(leaf: Any) -> Any:
        if isinstance(leaf, Moments | Clipping):
            return leaf.widened()
        return np.asarray(leaf, np.float64)

    return jax.tree.map(wide, tree, is_leaf=lambda x: isinstance(x, Moments | Clipping))


def moments(y: jax.Array, other: jax.Array) -> Moments:
    """The moments of one batch, float32 scalars; infinite noise where ŷ alone is not finite."""
    y, other = y.astype(jnp.float32), other.astype(jnp.float32)
    # Squares of large floats overflow, so everything is in a unit that fits both tensors.
    unit = unit_of(y, other)
    y, other = y * (1 / unit), other * (1 / unit)
    counted = jnp.isfinite(y)
    # A value that int8 lost is worse than any noise, and is no number that could be summed.
    lost = jnp.any(counted & ~jnp.isfinite(other))
    y = jnp.where(counted, y, 0)
    other = jnp.where(counted & jnp.isfinite(other), other, 0)
    # A sample a row: decibels are averaged over samples, so that one loud sample does not hide the
    # others.
    rows = y.reshape(y.shape[0], -1) if y.ndim > 1 else y.reshape(1, -1)
    off = rows - other.reshape(rows.shape)
    signals, noises = jnp.sum(rows**2, axis=1), jnp.sum(off**2, axis=1)
    used = signals > 0
    # Noise of 0 is no ratio; the clip below makes it the best that a sample counts for.
    ratio = jnp.where(used, signals, 1) / jnp.maximum(noises, jnp.finfo(jnp.float32).tiny)
    decibels = jnp.clip(10 * jnp.log10(ratio), _LEAST_DB, _MOST_DB)
    return Moments(
        signal=jnp.sum(signals),
        noise=jnp.where(lost, jnp.inf, jnp.sum(noises)),
        power=jnp.sum(other**2),
        cross=jnp.sum(y * other),
        decibels=jnp.sum(jnp.where(used, jnp.where(lost, _LEAST_DB, decibels), 0)),
        samples=jnp.sum(used).astype(jnp.float32),
        unit=unit,
    )


def add(a: Moments, b: Moments) -> Moments:
    """The moments of two batches together, both with a unit of 1."""
    return Moments(*(x + y for x, y in zip(a[:-1], b[:-1], strict=True)))


def join(a: Ends, b: Ends) -> Ends:
    """The ends of two batches together."""
    least, most = np.minimum, np.maximum
    return Ends(
        least(a.low, b.low),
        most(a.high, b.high),
        least(a.int8_low, b.int8_low),
        most(a.int8_high, b.int8_high),
    )
