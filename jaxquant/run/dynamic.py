"""int8 operands whose scales are computed in each call.

Symmetric, scale = the largest |x| / 127, for the smallest parts of a tensor that an integer sum
allows, so that no sample's scale depends on another sample: every row of a dot's operand (what is
summed to one element), every sample and feature group of a convolution's input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.backends import int8
from jaxquant.graph import evaluate, ir
from jaxquant.plan.grid import SMALLEST_SCALE


def quantize_operands(
    env: evaluate.Environment, eqn: ir.Equation, weight: ir.Var | None
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What a convolution or dot reads beside its weight, as `quantize_operand` gives it."""
    found = [
        quantize_operand(eqn, position, env.wide(atom), env.graph.shape(eqn.inputs[1 - position]))
        for position, atom in enumerate(eqn.inputs)
        if atom != weight
    ]
    return [x for x, _ in found], [scale for _, scale in found]


def quantize_operand(
    eqn: ir.Equation, position: int, x: jax.Array, other: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """An operand of a convolution or dot as int8, and what its integers are worth.

    Args:
      eqn: the convolution or dot.
      position: the operand's place; 0 for a convolution.
      x: the operand, floats.
      other: the shape of the other operand.

    Returns:
      int8 in the shape of `x`, and float32 scales that broadcast to the shape of the result.
    """
    if eqn.name == "conv_general_dilated":
        return _conv_input(x.astype(jnp.float32), other, eqn.params)
    return _dot_operand(x.astype(jnp.float32), position, len(other), eqn.params)


def _grid(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of a threshold and its inverse; of 0, a scale that keeps zeros zero."""
    threshold = jnp.maximum(threshold, jnp.float32(127 * SMALLEST_SCALE))
    return threshold * jnp.float32(1 / 127), jnp.float32(127) / threshold


def _dot_operand(
    x: jax.Array, position: int, other_rank: int, params: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """A scale for each index along the axes that are not summed over."""
    contracts, batches = params["dimension_numbers"]
    contract, batch = contracts[position], batches[position]
    threshold = jnp.max(jnp.abs(x), axis=tuple(contract), keepdims=True, initial=0)
    scale, inverse = _grid(threshold)
    free = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    # The result has the batch axes, the free axes of the first operand, those of the second.
    others = [1] * (other_rank - len(contract) - len(batch))
    sizes = [x.shape[a] for a in (*batch, *free)]
    ends = [*others, *sizes[len(batch) :]] if position else [*sizes[len(batch) :], *others]
    placed = scale.transpose([*batch, *free, *contract]).reshape([*sizes[: len(batch)], *ends])
    return int8.quantize(x, inverse), placed


def _conv_input(
    x: jax.Array, kernel: tuple[int, ...], params: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array]:
    """A scale for each sample and feature group."""
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    samples, channels = x.shape[spec.lhs_spec[0]], x.shape[spec.lhs_spec[1]]
    rows = x.transpose(spec.lhs_spec).reshape(samples, groups, -1)
    scale, inverse = _grid(jnp.max(jnp.abs(rows), axis=2, initial=0))
    outputs = kernel[spec.rhs_spec[0]]
    spread = _by_channel(inverse, channels, spec.lhs_spec)
    return int8.quantize(x, spread), _by_channel(scale, outputs, spec.out_spec)


def _by_channel(scale: jax.Array, channels: int, axes: Sequence[int]) -> jax.Array:
    """[N, G] for tensors of so many channels: N and the channels at `axes`, size 1 elsewhere."""
    samples, groups = scale.shape
    if groups > 1:
        each = (samples, groups, channels // groups)
        scale = jnp.broadcast_to(scale[:, :, None], each).reshape(samples, channels)
    shape = [1] * len(axes)
    shape[axes[0]], shape[axes[1]] = samples, math.prod(scale.shape[1:])
    return (scale if axes[0] < axes[1] else scale.T).reshape(shape)
