"""How far a site's int8 output is from the float one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant import native
from jaxquant.graph import evaluate, jax_shim
from jaxquant.graph.primitives import Channels
from jaxquant.native.differences import output_types
from jaxquant.plan.epilogue import Epilogue
from jaxquant.recover.activation import Activation
from jaxquant.run.fusion import NO_CLAMP, Clamp


class Powers(NamedTuple):
    """Σ y² and Σ (y - ŷ)², float32 []; infinite noise where the int8 model alone is not finite."""

    signal: jax.Array
    noise: jax.Array


class Shift(NamedTuple):
    """How far a site's channels are off, float32 [C] each, of JAX or of NumPy.

    With f the activation behind the site and w = (f(y) - f(ŷ)) / (y - ŷ) its slope between the two
    values (1 for no activation; 0 where a ReLU has them both): Σ w (y - ŷ), Σ w (y - ŷ)² and Σ w.
    """

    difference: Any
    square: Any
    weight: Any

    def mean(self) -> Any:
        """The weighted mean of y - ŷ, shrunk by what it may owe to chance; 0 where nothing counts.

        m² / (m² + s²) of the mean m, with s its standard error for Σ w independent values: a single
        sample tells nothing of the others.
        """
        xp = self.weight.__array_namespace__()
        known = self.weight > 1
        count = xp.where(known, self.weight, 2)
        mean = xp.where(known, self.difference, 0) / count
        power = mean**2
        variance = xp.maximum(xp.where(known, self.square, 0) / count - power, 0)
        off = power > 0
        return mean * power / xp.where(off, power + variance / (count - 1), 1)


class Compared(NamedTuple):
    """What is known of one site: a `Shift` [3, C], its mean [C] and the `Powers` [2], as arrays."""

    shift: jax.Array
    mean: jax.Array
    powers: jax.Array


def compare_outputs(
    epilogue: Epilogue, activation: Activation, reference: evaluate.Environment, value: jax.Array
) -> Compared:
    """Compare a site whose int8 output, behind the affine part of its epilogue, is `value`.

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
        shift = shift_of(wanted - value, gain, channels)
        return jnp.stack(shift), shift.mean(), _powers(wanted, value)

    if channels.axes != (value.ndim - 1,):
        return Compared(*portable(*operands))
    return Compared(*_choose(portable, bounds, operands))


def powers(reference: Any, quantized: Any) -> jax.Array:
    """`Powers` [2], over the elements where y is finite."""
    operands = [x.astype(jnp.float32) for x in (reference, quantized)]
    if not operands[0].ndim:
        return _powers(*operands)

    def portable(reference: jax.Array, quantized: jax.Array) -> Sequence[jax.Array]:
        unread = [jnp.zeros(s.shape) for s in output_types(reference.shape[-1])[:2]]
        return *unread, _powers(reference, quantized)

    return _choose(portable, NO_CLAMP, operands)[2]


def _choose(
    portable: Callable[..., Sequence[jax.Array]], bounds: Clamp, operands: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """`portable`, or the native kernel that gives the same where it runs.

    Args:
      portable: its arguments and results are those of `native.differences`, but for the clamp.
      bounds: the clamp.
      operands: the tensors.
    """
    if not native.runs_here():
        return portable(*operands)

    def natively(y: jax.Array, y_hat: jax.Array, *gain: jax.Array) -> Sequence[jax.Array]:
        return native.differences(y, y_hat, bounds, *gain)

    outputs = output_types(operands[0].shape[-1])
    return jax_shim.choose_on_one_cpu(natively, portable, outputs, operands)


def shift_of(off: jax.Array, gain: jax.Array, channels: Channels) -> Shift:
    """From y - ŷ and f(y) - f(ŷ); values that are not finite are left out."""
    slope = jnp.where(off == 0, 0, gain / jnp.where(off == 0, 1, off))
    usable = jnp.isfinite(off) & jnp.isfinite(slope)
    weight = jnp.where(usable, jnp.clip(slope, 0, 1), 0)
    off = jnp.where(usable, off, 0)
    return Shift(*(channels.sums(weight * power) for power in (off, off**2, jnp.ones_like(off))))


def _powers(reference: jax.Array, quantized: jax.Array) -> jax.Array:
    compared = jnp.isfinite(reference)
    noise = jnp.sum(jnp.where(compared, reference - quantized, 0) ** 2)
    signal = jnp.sum(jnp.where(compared, reference, 0) ** 2)
    return jnp.stack([signal, jnp.where(jnp.isnan(noise), jnp.inf, noise)])
