"""How far a site's int8 output is from the float one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import native
from jaxquant.graph import evaluate, jax_shim
from jaxquant.graph.primitives import Channels
from jaxquant.native.differences import output_types
from jaxquant.plan.epilogue import Epilogue
from jaxquant.recover.activation import Activation
from jaxquant.run.fusion import NO_CLAMP


class Powers(NamedTuple):
    """Σ y² and Σ (y - ŷ)², float32 []; infinite noise where the int8 model alone is not finite."""

    signal: jax.Array
    noise: jax.Array


class Shift(NamedTuple):
    """How far a site's channels are off, float32 [C] each.

    With f the activation behind the site and w = (f(y) - f(ŷ)) / (y - ŷ) its slope between the two
    values (1 for no activation; 0 where a ReLU has them both): Σ w (y - ŷ), Σ w (y - ŷ)² and Σ w.
    """

    difference: jax.Array
    square: jax.Array
    weight: jax.Array

    def mean(self) -> jax.Array:
        """The weighted mean of y - ŷ, shrunk by what it may owe to chance; 0 where nothing counts.

        m² / (m² + s²) of the mean m, with s its standard error for Σ w independent values: a single
        sample tells nothing of the others.
        """
        count = jnp.where(self.weight > 0, self.weight, 1)
        mean = jnp.where(self.weight > 0, self.difference, 0) / count
        variance = jnp.maximum(jnp.where(self.weight > 0, self.square, 0) / count - mean**2, 0)
        chance = variance / jnp.maximum(count - 1, 0)
        power = mean**2
        return jnp.where((power > 0) & (count > 1), mean * power / (power + chance), 0)


def compare_outputs(
    epilogue: Epilogue, activation: Activation, reference: evaluate.Environment, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A `Shift` [3, C] and the `Powers` [2], as arrays.

    Of a site whose int8 output, behind the affine part of its epilogue, is `value`.

    Args:
      epilogue: of the site.
      activation: the one behind the site.
      reference: the float model's values.
      value: ŷ, of the shape of the site's output.
    """
    wanted = reference.read(epilogue.output).astype(jnp.float32)
    channels = epilogue.channels
    clamp, operands = activation.clamp(reference.graph), [wanted, value]
    if clamp is None:
        both = (activation.of(x, reference).astype(jnp.float32) for x in (wanted, value))
        operands.append(jnp.subtract(*both))
    bounds = clamp or NO_CLAMP

    def portable(wanted: jax.Array, value: jax.Array, *given: jax.Array) -> Sequence[jax.Array]:
        gain = given[0] if given else jnp.clip(wanted, *bounds) - jnp.clip(value, *bounds)
        sums = shift_of(wanted - value, gain, channels)
        return jnp.stack(sums), powers(wanted, value)

    def natively(wanted: jax.Array, value: jax.Array, *given: jax.Array) -> Sequence[jax.Array]:
        return native.differences(wanted, value, bounds, *given)

    if native.runs_here() and value.ndim and channels.axes == (value.ndim - 1,):
        outputs = output_types(value.shape[-1])
        sums, power = jax_shim.choose_on_one_cpu(natively, portable, outputs, operands)
    else:
        sums, power = portable(*operands)
    return sums, power


def shift_of(off: jax.Array, gain: jax.Array, channels: Channels) -> Shift:
    """From y - ŷ and f(y) - f(ŷ); values that are not finite are left out."""
    slope = jnp.where(off == 0, 0, gain / jnp.where(off == 0, 1, off))
    usable = jnp.isfinite(off) & jnp.isfinite(slope)
    weight = jnp.where(usable, jnp.clip(slope, 0, 1), 0)
    off = jnp.where(usable, off, 0)
    return Shift(*(channels.sums(weight * power) for power in (off, off**2, jnp.ones_like(off))))


def powers(reference: Any, quantized: Any) -> jax.Array:
    """`Powers` [2], over the elements where y is finite."""
    reference, quantized = reference.astype(jnp.float32), quantized.astype(jnp.float32)
    compared = jnp.isfinite(reference)
    noise = jnp.sum(jnp.where(compared, reference - quantized, 0) ** 2)
    signal = jnp.sum(jnp.where(compared, reference, 0) ** 2)
    return jnp.stack([signal, jnp.where(jnp.isnan(noise), jnp.inf, noise)])
