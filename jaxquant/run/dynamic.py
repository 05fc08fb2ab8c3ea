"""int8 operands whose scales are computed in each call.

Symmetric, scale = the largest |x| / 127, for the smallest parts of a tensor that an integer sum
allows, so that no sample's scale depends on another sample: every row of a dot's operand (what is
summed to one element), every sample and feature group of a convolution's input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.backends import int8
from jaxquant.graph import evaluate, ir
from jaxquant.graph.contraction import Contraction
from jaxquant.graph.sites import Site
from jaxquant.plan.grid import SMALLEST_SCALE


def quantize_operands(
    env: evaluate.Environment, eqn: ir.Equation, site: Site
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What a convolution or dot reads beside its weight, as `quantize_operand` gives it."""
    shapes = [env.graph.shape(atom) for atom in eqn.inputs]
    found = [
        quantize_operand(site.as_contraction, position, env.wide(atom), shapes[1 - position])
        for position, atom in enumerate(eqn.inputs[:2])
        if atom != site.weight
    ]
    return [x for x, _ in found], [scale for _, scale in found]


def quantize_operand(
    contraction: Contraction, position: int, x: jax.Array, other: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """An operand of a convolution or dot as int8, and what its integers are worth.

    Args:
      contraction: the convolution or dot.
      position: the operand's place; 0 for a convolution.
      x: the operand, floats.
      other: the shape of the other operand.

    Returns:
      int8 in the shape of `x`, and float32 scales that broadcast to the shape of the result.
    """
    x = x.astype(jnp.float32)
    if contraction.window is not None:
        return _conv_input(x, other, contraction)
    return _dot_operand(x, position, contraction)


def _grid(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of a threshold and its inverse; of 0, a scale that keeps zeros zero."""
    threshold = jnp.maximum(threshold, jnp.float32(127 * SMALLEST_SCALE))
    return threshold * jnp.float32(1 / 127), jnp.float32(127) / threshold


def _dot_operand(
    x: jax.Array, position: int, contraction: Contraction
) -> tuple[jax.Array, jax.Array]:
    """A scale for each index along the axes that are not summed over."""
    own = contraction.operands[position]
    threshold = jnp.max(jnp.abs(x), axis=own.contracted, keepdims=True, initial=0)
    scale, inverse = _grid(threshold)
    kept = (*own.batch, *own.free)
    ordered = scale.transpose([*kept, *own.contracted])
    shape = contraction.spread_shape(position, [x.shape[a] for a in kept])
    return int8.quantize(x, inverse), ordered.reshape(shape)


def _conv_input(
    x: jax.Array, kernel: tuple[int, ...], contraction: Contraction
) -> tuple[jax.Array, jax.Array]:
    """A scale for each sample and feature group."""
    own, (samples, channels) = contraction.operands[0], contraction.result.free
    rows = x.transpose((*own.free, *own.contracted, *own.window))
    rows = rows.reshape(rows.shape[0], contraction.feature_groups, -1)
    scale, inverse = _grid(jnp.max(jnp.abs(rows), axis=2, initial=0))
    inputs, outputs = x.shape[own.contracted[0]], kernel[contraction.operands[1].free[0]]
    spread = _by_channel(inverse, inputs, (*own.free, *own.contracted), x.ndim)
    return int8.quantize(x, spread), _by_channel(scale, outputs, (*samples, *channels), x.ndim)


def _by_channel(scale: jax.Array, channels: int, axes: Sequence[int], rank: int) -> jax.Array:
    """[N, G] for tensors of so many channels: N and the channels at `axes`, size 1 elsewhere."""
    samples, groups = scale.shape
    if groups > 1:
        each = (samples, groups, channels // groups)
        scale = jnp.broadcast_to(scale[:, :, None], each).reshape(samples, channels)
    shape = [1] * rank
    shape[axes[0]], shape[axes[1]] = samples, math.prod(scale.shape[1:])
    return (scale if axes[0] < axes[1] else scale.T).reshape(shape)
