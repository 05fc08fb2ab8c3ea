"""int8 operands whose scales are computed in each call.

Scales are of the smallest parts of a tensor that an integer sum allows, so that no sample's scale
depends on another sample: every row of a dot's operand (what is summed to one element), every
sample and feature group of a convolution's input.  They are symmetric, the largest |x| / 127, but
for the rows that meet a stored weight: their integers take the 256 steps from the row's least to
its largest value, 0 within, since rows are lopsided (behind a GELU, or by an outlier), and the
zero point's part of each sum is known from the weight (`jaxquant.plan.layout`, "weight_sum").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import int8, operations
from jaxquant.graph import evaluate, ir
from jaxquant.graph.contraction import Contraction
from jaxquant.jax_shim.extremes import largest, least
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.grid import SMALLEST_SCALE


class Scaled(NamedTuple):
    """An operand on grids of its own.

    Attributes:
      int8: in its shape.
      scale: float32, what its integers are worth; broadcasts to the shape of the result.
      zero_point: likewise int32, the integers that stand for zero; None for 0.
    """

    int8: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None


def quantize_operands(
    env: evaluate.Environment, eqn: ir.Equation, int8_site: Int8Site, natively: bool = False
) -> list[Scaled]:
    """What a convolution or dot reads beside its weight, on grids that are found in the call.

    Args:
      env: the tensors.
      eqn, int8_site: the site.
      natively: by a kernel where there is one, which gives the same.
    """
    site = int8_site.site
    contraction, is_asymmetric = site.as_contraction, int8_site.asymmetric
    shapes = [env.graph.shape(atom) for atom in eqn.inputs]
    found = []
    for position, atom in enumerate(eqn.inputs[:2]):
        # A weight has its scale already.
        if atom == site.weight:
            continue
        x = env.wide(atom).astype(jnp.float32)
        if contraction.window is not None:
            found.append(_conv_input(x, shapes[1 - position], contraction))
        else:
            found.append(_dot_operand(x, position, contraction, is_asymmetric, natively))
    return found


def _grid(threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of a threshold and its inverse; of 0, a scale that keeps zeros zero."""
    # A row of zeros gets the smallest scale, whose inverse is finite, and stays zeros.
    threshold = jnp.maximum(threshold, jnp.float32(127 * SMALLEST_SCALE))
    return threshold * jnp.float32(1 / 127), jnp.float32(127) / threshold


def _asymmetric_grid(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scale, its inverse and the zero point (a float) of what lies in [low, high], 0 in it.

    No product is added to anything before it is rounded: a compiler may round both at once in one
    place and not in another, and the zero point is needed in two.
    """
    half = high * jnp.float32(0.5) - low * jnp.float32(0.5)  # exact; the whole may overflow
    scale = jnp.maximum(half * jnp.float32(2 / 255), jnp.float32(SMALLEST_SCALE))
    inverse = jnp.float32(1) / scale
    zero_point = -128 - lax.round(low * inverse, lax.RoundingMethod.TO_NEAREST_EVEN)
    return scale, inverse, lax.clamp(jnp.float32(-128), zero_point, jnp.float32(127))


def _dot_operand(
    x: jax.Array, position: int, contraction: Contraction, is_asymmetric: bool, natively: bool
) -> Scaled:
    """A grid for each index along the axes that are not summed over."""
    own = contraction.operands[position]
    kept = (*own.batch, *own.free)
    shape = contraction.spread_shape(position, [x.shape[a] for a in kept])

    def rows(x: jax.Array, axes: tuple[int, ...]) -> Sequence[jax.Array]:
        """The integers, scales and zero points of rows along `axes`, which keep their size 1."""
        if not is_asymmetric:
            # `initial` is the maximum of no elements, of batches of none.
            threshold = largest(jnp.abs(x), axis=axes, keepdims=True, initial=0)
            scale, inverse = _grid(threshold)
            return int8.quantize(x, inverse), scale, jnp.zeros(scale.shape, jnp.int32)
        low, high = (
            reduced(x, axis=axes, keepdims=True, initial=0) for reduced in (least, largest)
        )
        scale, inverse, zero_point = _asymmetric_grid(low, high)
        return int8.quantize(x, inverse, zero_point), scale, zero_point.astype(jnp.int32)

    # The native kernel takes rows that are together in memory, their summed axes last.
    first = x.ndim - len(own.contracted)
    if natively and own.contracted == (*range(first, x.ndim),):
        flat = x.reshape(*x.shape[:first], math.prod(x.shape[first:]))
        q, *grid = _native_rows(rows, flat, is_asymmetric)
        q = q.reshape(x.shape)
        scale, zero_point = (each.reshape(*each.shape, *[1] * len(own.contracted)) for each in grid)
    else:
        q, scale, zero_point = rows(x, own.contracted)

    def at_the_result(each: jax.Array) -> jax.Array:
        # Of size 1 along the sums, then spread over the result's axes: it multiplies sums as it is.
        return each.transpose([*kept, *own.contracted]).reshape(shape)

    return Scaled(q, at_the_result(scale), at_the_result(zero_point) if is_asymmetric else None)


def _native_rows(
    rows: Callable[[jax.Array, tuple[int, ...]], Sequence[jax.Array]],
    x: jax.Array,
    is_asymmetric: bool,
) -> Sequence[jax.Array]:
    """The integers, scales and zero points of x [..., K], by a kernel where one runs."""

    def portable(x: jax.Array) -> Sequence[jax.Array]:
        # The kernel gives a number a row; the portable form kept the summed axis, with size 1.
        q, scale, zero_point = rows(x, (x.ndim - 1,))
        return q, scale[..., 0], zero_point[..., 0]

    return operations.quantize_rows(
        portable, x, is_asymmetric=is_asymmetric, smallest_scale=SMALLEST_SCALE
    )


def _conv_input(x: jax.Array, kernel: tuple[int, ...], contraction: Contraction) -> Scaled:
    """A scale for each sample and feature group."""
    own, (samples, channels) = contraction.operands[0], contraction.result.free
    rows = x.transpose((*own.free, *own.contracted, *own.window))
    groups = contraction.feature_groups
    rows = rows.reshape(rows.shape[0], groups, math.prod(rows.shape[1:]) // groups)
    # Symmetric, since what pads the border is the zero point, and each sample would have its own.
    scale, inverse = _grid(largest(jnp.abs(rows), axis=2, initial=0))
    inputs, outputs = x.shape[own.contracted[0]], kernel[contraction.operands[1].free[0]]
    spread = _by_channel(inverse, inputs, (*own.free, *own.contracted), x.ndim)
    worth = _by_channel(scale, outputs, (*samples, *channels), x.ndim)
    return Scaled(int8.quantize(x, spread), worth)


def _by_channel(scale: jax.Array, channels: int, axes: Sequence[int], rank: int) -> jax.Array:
    """[N, G] for tensors of so many channels: N and the channels at `axes`, size 1 elsewhere."""
    samples, groups = scale.shape
    if groups > 1:
        each = (samples, groups, channels // groups)
        scale = jnp.broadcast_to(scale[:, :, None], each).reshape(samples, channels)
    shape = [1] * rank
    # Where samples come behind the channels, the matrix is turned.
    shape[axes[0]], shape[axes[1]] = samples, math.prod(scale.shape[1:])
    return (scale if axes[0] < axes[1] else scale.T).reshape(shape)
