"""How far a site's int8 output is from the float one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.backends import operations
from jaxquant.backends.backend import NO_CLAMP
from jaxquant.graph import evaluate
from jaxquant.graph.primitives import Channels
from jaxquant.plan.epilogue import Epilogue
from jaxquant.recover.activation import Activation


class Powers(NamedTuple):
    """Σ y² and Σ (y - ŷ)²; infinite noise where the int8 model alone is not finite."""

    signal: float
    noise: float

    @staticmethod
    def of(array: np.ndarray) -> Powers:
        """Read what `powers` gives; in float64, which holds the squares of any float32."""
        # The unit's square may be beyond float32.
        signal, noise, unit = np.asarray(array, np.float64).tolist()
        return Powers(signal * unit**2, noise * unit**2)


class Shift(NamedTuple):
    """How far a site's channels are off, [C] each, of JAX or of NumPy.

    A site inside a scan over stacked weights has them as [L, C], a layer for each step, and `unit`
    as [L].

    With f the activation behind the site and w = (f(y) - f(ŷ)) / (y - ŷ) its slope between the two
    values (1 for no activation; 0 where a ReLU has them both): Σ w (y - ŷ), Σ w (y - ŷ)² and Σ w.
    `unit` [] is what y - ŷ is measured in.
    """

    difference: Any
    square: Any
    weight: Any
    unit: Any = 1.0

    @staticmethod
    def of(sums: Any, unit: Any) -> Shift:
        """Read the sums from one array, [3, C] or [L, 3, C]."""
        return Shift(sums[..., 0, :], sums[..., 1, :], sums[..., 2, :], unit)

    def sums(self) -> np.ndarray:
        """float64 [3, C] or [3, L, C], the first three with a unit of 1."""
        unit = np.asarray(self.unit, np.float64)[..., None]
        factors = np.stack([unit, unit**2, np.ones_like(unit)])
        return np.asarray([self.difference, self.square, self.weight], np.float64) * factors

    def plus(self, other: Shift) -> Shift:
        """The shift of two parts of a tensor as one, in the larger of their units."""
        parts = [jnp.stack(x[:3], axis=-2) for x in (self, other)]
        units = jnp.asarray(self.unit), jnp.asarray(other.unit)
        sums = add_shifts(parts[0], units[0], parts[1], units[1])
        return Shift.of(sums, jnp.maximum(*units))

    def nothing(self) -> Shift:
        """The shift of no value: zeros of these shapes, the unit too."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self)

    def mean(self) -> Any:
        """The weighted mean of y - ŷ, shrunk by what it may owe to chance; 0 where nothing counts.

        m² / (m² + s²) of the mean m, with s its standard error for Σ w independent values: a single
        sample tells nothing of the others.
        """
        # In the compiled comparison these are JAX's arrays, over all batches NumPy's in float64.
        xp = self.weight.__array_namespace__()

        # One value has no spread to judge its mean by.
        known = self.weight > 1
        count = xp.where(known, self.weight, 2)
        mean = xp.where(known, self.difference, 0) / count
        power = mean**2
        variance = xp.maximum(xp.where(known, self.square, 0) / count - power, 0)
        off = power > 0
        kept = power / xp.where(off, power + variance / (count - 1), 1)
        unit = xp.asarray(self.unit)
        return mean * kept * unit.reshape(*unit.shape, *(1,) * (mean.ndim - unit.ndim))


class Compared(NamedTuple):
    """What is known of one site, as arrays: the first three of a `Shift`, [3, C], its mean [C], and
    what `powers` gives, [3], with the unit of the shift too.
    """

    shift: jax.Array
    mean: jax.Array
    powers: jax.Array


def compare_outputs(
    epilogue: Epilogue,
    activation: Activation,
    reference: evaluate.Environment,
    value: jax.Array,
    real: jax.Array | None = None,
) -> Compared:
    """Compare a site whose int8 output, behind the affine part of its epilogue, is `value`.

    Args:
      epilogue: of the site.
      activation: the one behind the site.
      reference: the float model's values.
      value: ŷ, of the shape of the site's output.
      real: which entries belong to no padding, bool of a shape that is broadcast to it; None where
        all are compared.
    """
    wanted = without_padding(reference.read(epilogue.output), real).astype(jnp.float32)
    channels = epilogue.channels
    clamp, operands = activation.clamp(reference.graph), [wanted, value]
    if clamp is None:
        both = (activation.of(x, reference).astype(jnp.float32) for x in (wanted, value))
        # The native kernel knows clips; of another activation it is given f(y) - f(ŷ).
        operands.append(jnp.subtract(*both))
    bounds = clamp or NO_CLAMP

    def portable(wanted: jax.Array, value: jax.Array, *given: jax.Array) -> Sequence[jax.Array]:
        # Clips are taken here, as in the native kernel, so that both see the same gain.
        gain = given[0] if given else jnp.clip(wanted, *bounds) - jnp.clip(value, *bounds)
        unit = unit_of(wanted, value)
        wanted, value, gain = (x * (1 / unit) for x in (wanted, value, gain))
        shift = shift_of(wanted - value, gain, channels, unit)
        return jnp.stack(shift[:3]), shift.mean(), _powers(wanted, value, unit)

    # The native kernel walks rows and keeps a sum for each place in them: the channels have to be
    # the last axis.
    if channels.axes != (value.ndim - 1,):
        return Compared(*portable(*operands))
    return Compared(*operations.differences(portable, bounds, operands))


def without_padding(reference: Any, real: jax.Array | None) -> jax.Array:
    """What the float model gives, with NaN, which no comparison counts, where padding is."""
    values = jnp.asarray(reference)
    return values if real is None else jnp.where(real, values, jnp.nan)


def powers(reference: Any, quantized: Any) -> jax.Array:
    """`Powers` over the elements where y is finite, float32 [3]: in a unit, and the unit."""
    operands = [x.astype(jnp.float32) for x in (reference, quantized)]

    def scaled(reference: jax.Array, quantized: jax.Array) -> jax.Array:
        unit = unit_of(reference, quantized)
        return _powers(reference * (1 / unit), quantized * (1 / unit), unit)

    if not operands[0].ndim:
        return scaled(*operands)

    def portable(reference: jax.Array, quantized: jax.Array) -> Sequence[jax.Array]:
        # Of what the kernel gives only the powers are wanted.
        unread = [jnp.zeros(s.shape) for s in operations.difference_types(reference.shape[-1])[:2]]
        return *unread, scaled(reference, quantized)

    return operations.differences(portable, NO_CLAMP, operands)[2]


def add_powers(powers: jax.Array, others: jax.Array) -> jax.Array:
    """What `powers` gives of two parts of a tensor, [..., 3] each, as of the whole.

    In the larger of their units, so that no square overflows; a unit of 0 is of nothing seen.
    """
    unit = jnp.maximum(powers[..., 2], others[..., 2])
    parts = [_in_unit(x[..., :2, None], (2, 2), x[..., 2], unit) for x in (powers, others)]
    return jnp.concatenate([(parts[0] + parts[1])[..., 0], unit[..., None]], axis=-1)


def add_shifts(
    shift: jax.Array, unit: jax.Array, other: jax.Array, its_unit: jax.Array
) -> jax.Array:
    """The first three of a `Shift`, [..., 3, C], of two parts, in the larger of the two units."""
    larger = jnp.maximum(unit, its_unit)
    # A difference is in units, its square in their squares, a weight in none.
    powers = 1, 2, 0
    return _in_unit(shift, powers, unit, larger) + _in_unit(other, powers, its_unit, larger)


def _in_unit(
    sums: jax.Array, degrees: tuple[int, ...], unit: jax.Array, wanted: jax.Array
) -> jax.Array:
    """Sums [..., K, C] of K powers of differences in a unit [...], in another one."""
    ratio = unit / jnp.where(wanted > 0, wanted, 1)
    factors = jnp.stack([ratio**degree for degree in degrees], axis=-1)[..., None]
    # Infinity times a factor that came to 0 would be NaN, and hide that the int8 model overflowed.
    return jnp.where(jnp.isinf(sums), sums, sums * factors)


def shift_of(
    off: jax.Array, gain: jax.Array, channels: Channels, unit: jax.Array | float = 1.0
) -> Shift:
    """Sum y - ŷ and f(y) - f(ŷ), both in a unit; values that are not finite are left out."""
    slope = jnp.where(off == 0, 0, gain / jnp.where(off == 0, 1, off))
    # A slope is a weight here: none is below 0, as left of the least value of a GELU, and none
    # counts a value more than once.
    usable = jnp.isfinite(off) & jnp.isfinite(slope)
    weight = jnp.where(usable, jnp.clip(slope, 0, 1), 0)
    off = jnp.where(usable, off, 0)
    difference, square = channels.sums(weight * off), channels.sums(weight * off**2)
    return Shift(difference, square, channels.sums(weight), unit)


def unit_of(*arrays: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
    """A power of two in which the squares of all that is finite in some tensors are floats.

    There is one for each index beside `axis`; for None one for all.

    1 where the largest magnitude is within [2**-40, 2**40] anyway, so that ordinary tensors are
    measured as they are; else the largest power of two not above it whose inverse is a float too.
    """
    finite = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0) for x in arrays]
    largest = functools.reduce(jnp.maximum, [jnp.max(x, axis=axis, initial=0) for x in finite])
    # The exponent is read off the bits, exactly: 254 at most, since infinity is left out.  The
    # inverse of 2**127, whose exponent is 254, would be subnormal.
    # The sign is none, since these are magnitudes.
    biased = jax.lax.bitcast_convert_type(largest, jnp.int32) >> 23
    power = jax.lax.bitcast_convert_type(jnp.clip(biased, 1, 253) << 23, jnp.float32)
    ordinary = (largest == 0) | ((biased >= 127 - 40) & (biased < 127 + 40))
    return jnp.where(ordinary, jnp.float32(1), power)


def _powers(reference: jax.Array, quantized: jax.Array, unit: jax.Array) -> jax.Array:
    compared = jnp.isfinite(reference)
    # Where the float model overflows there is nothing to compare; where the int8 model alone does,
    # the noise is infinite and shows it.
    noise = jnp.sum(jnp.where(compared, reference - quantized, 0) ** 2)
    signal = jnp.sum(jnp.where(compared, reference, 0) ** 2)
    return jnp.stack([signal, jnp.where(jnp.isnan(noise), jnp.inf, noise), unit])
