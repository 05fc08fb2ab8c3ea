"""The int8 operations: quantize, and dots with int32 accumulation; `conv` has convolution.

Round half to even, saturate to [-128, 127].  A tensor with zero point z stands for its integers
less z.  Each operation is exact in integers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends.conv import conv
from jaxquant.graph import ir
from jaxquant.jax_shim import jaxprs


def quantize(x: jax.Array, inv_scale: jax.Array, zero_point: int = 0) -> jax.Array:
    """Round `x * inv_scale` half to even, add the zero point and saturate; any shape, to int8."""
    scaled = lax.round(x.astype(jnp.float32) * inv_scale, lax.RoundingMethod.TO_NEAREST_EVEN)
    if zero_point:
        scaled = scaled + jnp.float32(zero_point)
    return lax.clamp(jnp.float32(-128), scaled, jnp.float32(127)).astype(jnp.int8)


def dequantize(x: jax.Array, scale: jax.Array, zero_point: int = 0) -> jax.Array:
    """What int8 values stand for, as float32; any shape."""
    value = x.astype(jnp.float32)
    return (value - jnp.float32(zero_point) if zero_point else value) * scale


def accumulate(
    eqn: ir.Equation, operands: Sequence[jax.Array], zero_points: Sequence[int]
) -> jax.Array:
    """A convolution or dot of a tensor with a weight, to int32.

    A weight that the batch axes of a dot share has size 1 there.
    The sum keeps `zero_point * sum(weight)`, which the site's bias takes away; what pads the input
    adds to it too.
    """
    if eqn.name == "conv_general_dilated":
        return conv(operands[0], operands[1], eqn.params, zero_points[0])
    return dot_with_shared((operands[0], operands[1]), eqn.params)


def combine(
    eqn: ir.Equation, operands: Sequence[jax.Array], zero_points: Sequence[int]
) -> jax.Array:
    """A dot of two tensors, or a sum over one, of the values less their zero points; to int32."""
    if eqn.name == "dot_general":
        return dot_of_tensors((operands[0], operands[1]), eqn.params, zero_points)
    values = [x.astype(jnp.int32) - z for x, z in zip(operands, zero_points, strict=True)]
    (total,) = jaxprs.bind(eqn.primitive, values, dict(eqn.params))
    return total


def dot(operands: tuple[jax.Array, jax.Array], params: Mapping[str, Any]) -> jax.Array:
    """`dot_general` of two int8 arrays to int32; `params` are those of the float equation.

    A single row gets a second one of zeros: XLA's int8 product of a vector and a matrix is slower
    than its float32 one on CPU, that of two rows is not (`experiments/benchmarks/kinds.py`).
    """
    x, w = operands
    numbers = params["dimension_numbers"]
    (contract, _), (batch, _) = numbers
    free = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    if batch or not free or any(x.shape[a] != 1 for a in free) or w.ndim == len(contract):
        return lax.dot_general(x, w, numbers, preferred_element_type=jnp.int32)
    pads = [(0, int(a == free[0]), 0) for a in range(x.ndim)]
    result = lax.dot_general(
        lax.pad(x, jnp.int8(0), pads), w, numbers, preferred_element_type=jnp.int32
    )
    return lax.slice_in_dim(result, 0, 1, axis=0)


def dot_with_shared(operands: tuple[jax.Array, jax.Array], params: Mapping[str, Any]) -> jax.Array:
    """`dot`, where an operand may have size 1 along batch axes that the other has longer.

    It stands for copies.  Such an axis is one more free axis of the other operand, so that there
    are fewer and larger products, and no copies.
    """
    (contract, batch) = params["dimension_numbers"]
    shared = [
        n
        for n, (left, right) in enumerate(zip(*batch, strict=True))
        if operands[0].shape[left] != operands[1].shape[right]
    ]
    if not shared:
        return dot(operands, params)
    side = int(operands[1].shape[batch[1][shared[0]]] == 1)  # of the weight
    gone = [batch[side][n] for n in shared]
    weight = lax.squeeze(operands[side], gone)

    def moved(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(a - sum(g < a for g in gone) for a in axes)

    kept = [[axes[n] for n in range(len(axes)) if n not in shared] for axes in batch]
    pairs = [(tuple(contract[k]), tuple(kept[k])) for k in (0, 1)]
    pairs[side] = (moved(contract[side]), moved(kept[side]))
    x = operands[1 - side]
    both = (x, weight) if side else (weight, x)
    numbers = ((pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1]))
    result = dot(both, {**params, "dimension_numbers": numbers})
    # The result's axes, by what they were: the batch axes left, those of each operand.
    free = [a for a in range(x.ndim) if a not in (*contract[1 - side], *kept[1 - side])]
    own = [("free", a) for a in range(operands[side].ndim)
           if a not in (*contract[side], *batch[side])]  # fmt: skip
    theirs = [("batch", batch[1 - side].index(a)) if a in batch[1 - side] else ("other", a)
              for a in free]  # fmt: skip
    axes = [("batch", n) for n in range(len(batch[0])) if n not in shared]
    axes += [*theirs, *own] if side else [*own, *theirs]
    wanted = [("batch", n) for n in range(len(batch[0]))]
    rest = [axis for axis in axes if axis[0] != "batch"]
    return result.transpose([axes.index(axis) for axis in (*wanted, *rest)])


def dot_of_tensors(
    operands: tuple[jax.Array, jax.Array], params: Mapping[str, Any], zero_points: Sequence[int]
) -> jax.Array:
    """`dot` of two tensors less their zero points, by the sums along the contracted axes.

    sum (a - z)(b - w) = sum a b - w sum a - z sum b + z w K
    """
    total = dot(operands, params)
    contract, batch = params["dimension_numbers"]
    free = [x.ndim - len(c) - len(b) for x, c, b in zip(operands, contract, batch, strict=True)]
    z, w = zero_points
    if w:
        total = total - w * _sums(operands[0], contract[0], batch[0], 0, free[1])
    if z:
        total = total - z * _sums(operands[1], contract[1], batch[1], free[0], 0)
    if z and w:
        total = total + z * w * math.prod(operands[0].shape[a] for a in contract[0])
    return total


def _sums(
    x: jax.Array, contract: Sequence[int], batch: Sequence[int], before: int, after: int
) -> jax.Array:
    """int32 sums over the contracted axes, placed as in the dot: batch, `before`, free, `after`."""
    rest = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    ordered = x.astype(jnp.int32).transpose([*batch, *rest, *contract])
    sums = jnp.sum(ordered, axis=tuple(range(len(batch) + len(rest), x.ndim)), dtype=jnp.int32)
    shape = sums.shape
    return sums.reshape(*shape[: len(batch)], *[1] * before, *shape[len(batch) :], *[1] * after)
