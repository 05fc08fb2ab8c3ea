"""Weights that are stored as integers and dequantized in the model, a scale for each group of them.

`DequantizeLinear`, with blocks where a channel has several groups, in front of what reads the
weight; of a dot the weight is written as the matrix that a MatMul reads.  ONNX Runtime computes
both at once as its `MatMulNBits`, which a file for it alone may hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.stored import Stored
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.onnx import contraction
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.graph.contraction import Contraction
from jaxquant.plan.groups import GroupLayout

BLOCKS_SINCE = 21  # the opset with blocks in DequantizeLinear, and with integers of four bits
_FOUR_BITS = np.dtype(jnp.int4)
_CONTRIBUTED = "com.microsoft"
_CHANNEL_BLOCK = 32  # how a channel with one scale is cut for MatMulNBits, which has blocks alone


def since(groups: GroupLayout, bits: int) -> int:
    """The first opset in which such a weight can be stored."""
    return BLOCKS_SINCE if bits == 4 or groups.groups > 1 else 0


def dequantized(builder: Builder, stored: Stored, order: Sequence[int]) -> Value:
    """The weight in float, with its axes in a physical order."""
    shape, order = stored.shape, tuple(order)
    channels = [axis for axis in range(len(shape)) if axis not in stored.summed]
    integers, scale = stored.matrix(channels)
    wide = [axis for axis in channels if shape[axis] != 1]
    if len(scale) == 1 and len(wide) <= 1:  # one axis has scales: no block is needed
        sizes = [shape[axis] for axis in (*stored.summed, *channels)]
        places = [(*stored.summed, *channels).index(axis) for axis in order]
        whole = integers.reshape(sizes).transpose(places)
        axis = order.index(wide[0]) if wide else 0
        name = _dequantize(
            builder, whole, scale[0] if wide else scale.reshape(()), stored.bits, axis
        )
        return Value(name, shape, order)
    # Several axes of scales, or groups: as a matrix it has blocks along one axis.
    name = _matrix(builder, integers, scale, stored)
    sizes = [shape[axis] for axis in (*stored.summed, *channels)]
    name = builder.node("Reshape", [name, builder.ints(sizes)])
    return builder.ordered(Value(name, shape, (*stored.summed, *channels)), order)


def is_matrix(stored: Stored, given: Contraction, side: int) -> bool:
    """Whether a dot reads the weight at `side` as a matrix whose rows are what it sums over."""
    own = given.operands[side]
    is_plain = given.is_dot and not given.has_batch and given.choosing is None
    return is_plain and set(own.contracted) == set(stored.summed)


def dot(
    builder: Builder,
    given: Contraction,
    side: int,
    x: Value,
    stored: Stored,
    shape: tuple[Size, ...],
    is_onnxruntime: bool,
) -> Value:
    """A dot of `x`, the operand at `side`, with a stored matrix.

    Args:
      builder: of the graph.
      given: the dot.
      side: of the operand that is no weight.
      x: that operand, with all its copies.
      stored: the weight.
      shape: of the result.
      is_onnxruntime: whether no other runtime reads the file.
    """
    own, weight = given.operands[side], given.operands[1 - side]
    pairs = dict(zip(weight.contracted, own.contracted, strict=True))
    # Rows of the matrix lie in the order in which the groups go.
    x = builder.ordered(x, (*own.free, *(pairs[axis] for axis in stored.summed)))
    integers, scale = stored.matrix(weight.free)
    rows = [x.shape[axis] for axis in own.free]
    name = x.name
    if len(stored.summed) != 1:
        name = builder.reshape(name, x.physical, [*rows, len(integers)])
    # ONNX Runtime has a kernel that reads packed integers; elsewhere they are dequantized.
    packed = _packed(integers, scale, stored) if is_onnxruntime else None
    if packed is None:
        name = builder.node("MatMul", [name, _matrix(builder, integers, scale, stored)])
    else:
        words, scales, attributes = packed
        if stored.is_shared and words.size == integers.size:
            table = builder.constant(words.reshape(len(words), -1), "table")
            weight_name = builder.reshaped_constant(table, words.shape)
        else:
            weight_name = builder.constant(words, "weight_uint8")
        inputs = [name, weight_name, builder.constant(scales, "weight_scale")]
        name = builder.node("MatMulNBits", inputs, domain=_CONTRIBUTED, **attributes)
    return contraction.of_rows(builder, given, side, name, shape)


def _matrix(builder: Builder, integers: np.ndarray, scale: np.ndarray, stored: Stored) -> str:
    """A matrix [K, N] in float of its integers and their scales [G, N]."""
    turned = stored.is_shared
    if len(scale) == 1:
        return _dequantize(builder, integers, scale[0], stored.bits, 1, turned)
    size = stored.layout.size
    return _dequantize(builder, integers, scale, stored.bits, 0, turned, block_size=size)


def _dequantize(
    builder: Builder,
    integers: np.ndarray,
    scale: np.ndarray,
    bits: int,
    axis: int,
    turned: bool = False,
    **block: int,
) -> str:
    """Integers times their scales; with `turned`, a matrix that is in the file transposed."""
    if (bits == 4 or block) and builder.opset < BLOCKS_SINCE:
        what = "of 4 bits" if bits == 4 else "with scales for groups of a channel"
        raise NotCovered(f"weights {what} before opset {BLOCKS_SINCE}")
    stored = integers.astype(_FOUR_BITS) if bits == 4 else integers
    if turned:
        name = builder.transposed_constant(stored, "table")
    else:
        name = builder.constant(stored, f"weight_int{bits}")
    with builder.outermost():  # a loop reads the float: once for all its steps
        names = [name, builder.constant(scale, "weight_scale")]
        return builder.node("DequantizeLinear", names, "weight", axis=axis, **block)


def _packed(
    integers: np.ndarray, scale: np.ndarray, stored: Stored
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]] | None:
    """What MatMulNBits reads of a matrix [K, N]: words, scales and attributes; None for no form.

    Its blocks are of a power of two, 16 or more.  Rows are padded to whole blocks with zeros, which
    are 8 or 128 there.
    """
    (rows, columns), bits, size = integers.shape, stored.bits, stored.layout.size
    if len(scale) == 1:
        size = _CHANNEL_BLOCK
        scale = np.repeat(scale, -(-rows // size), axis=0)
    # The operator's blocks are of a power of two, and no smaller.
    if size < 16 or size & (size - 1):
        return None
    blocks, zero = len(scale), 1 << (bits - 1)
    # Digits without a sign, as the operator has them; what fills the last block up is zero.
    digits = np.full((columns, blocks * size), zero, np.uint8)
    digits[:, :rows] = (integers.T.astype(np.int16) + zero).astype(np.uint8)
    padded: np.ndarray = digits[:, ::2] | (digits[:, 1::2] << 4) if bits == 4 else digits
    words = padded.reshape(columns, blocks, size * bits // 8)
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": size, "accuracy_level": 1}
    return words, np.ascontiguousarray(scale.T), attributes
