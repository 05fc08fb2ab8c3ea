"""Weights that are stored as integers and dequantized in the model, a scale for each group of them.

`DequantizeLinear`, with blocks where a channel has several groups, in front of what reads the
weight; of a dot the weight is written as the matrix that a MatMul reads.  ONNX Runtime computes
both at once as its `MatMulNBits`, which a file for it alone may hold.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.onnx import contraction
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.graph.contraction import Contraction
from jaxquant.plan.groups import GroupLayout
from jaxquant.weights.groups import unpack

BLOCKS_SINCE = 21  # the opset with blocks in DequantizeLinear, and with integers of four bits
_FOUR_BITS = np.dtype(jnp.int4)
_CONTRIBUTED = "com.microsoft"
_CHANNEL_BLOCK = 32  # how a channel with one scale is cut for MatMulNBits, which has blocks alone


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight as it is stored.

    Attributes:
      integers: int8, in `layout.shape`.
      scale: float32, likewise with the groups in place of what is summed over.
      layout: its groups.
      bits: of the integers.
      axes: for each axis of the weight, which axis of `layout.permuted` it is.
      is_table: rows of it are looked up too, which then read what a dot does: it is in the file
        once, as [V, K].
    """

    integers: np.ndarray
    scale: np.ndarray
    layout: GroupLayout
    bits: int
    axes: tuple[int, ...]
    is_table: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether a lookup and a dot may read one array; ONNX picks no rows of 4-bit integers."""
        return self.is_table and self.bits == 8

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.layout.permuted[axis] for axis in self.axes)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the weight that a group goes along, in the order in which it does."""
        return tuple(map(self.axes.index, self._flattened))

    @property
    def _flattened(self) -> range:
        """The axes of `layout.permuted` that are one in `layout.shape`."""
        first = self.layout.axis
        return range(first, first + len(self.layout.permuted) - len(self.layout.shape) + 1)

    def transposed(self, permutation: Sequence[int]) -> Stored:
        return dataclasses.replace(self, axes=tuple(self.axes[a] for a in permutation))

    def matrix(self, channels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The integers [K, N] and scales [G, N], the weight's axes `channels` as N."""
        layout = self.layout
        kept = [axis for axis in range(len(layout.permuted)) if axis not in self._flattened]
        order = [1 + kept.index(self.axes[axis]) for axis in channels]
        found = []
        for array in (self.integers, self.scale):
            rows = np.moveaxis(array, layout.axis, 0)
            apart = rows.reshape(len(rows), *(layout.permuted[axis] for axis in kept))
            found.append(apart.transpose(0, *order).reshape(len(rows), -1))
        return found[0], found[1]


def since(groups: GroupLayout, bits: int) -> int:
    """The first opset in which such a weight can be stored."""
    return BLOCKS_SINCE if bits == 4 or groups.groups > 1 else 0


def read(integers: np.ndarray, scale: np.ndarray, layout: GroupLayout, bits: int) -> Stored:
    """A weight of the arrays that `qparams` has for it, in its own axes."""
    if bits == 4:
        integers = unpack(integers, layout.axis, layout.shape[layout.axis])
    else:
        integers = integers.transpose(layout.order).reshape(layout.shape)
    groups = [layout.groups if a == layout.axis else n for a, n in enumerate(layout.shape)]
    if layout.groups == 1 and scale.size == np.prod(groups):  # a scale for each channel
        scale = scale.reshape(groups)
    elif scale.ndim < len(groups):  # or one for each layer
        scale = scale.reshape(*scale.shape, *[1] * (len(groups) - scale.ndim))
    scale = np.broadcast_to(scale, groups).astype(np.float32)
    return Stored(integers, scale, layout, bits, layout.inverse)


def dequantized(b: Builder, stored: Stored, order: Sequence[int]) -> Value:
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
        name = _dequantize(b, whole, scale[0] if wide else scale.reshape(()), stored.bits, axis)
        return Value(name, shape, order)
    name = _matrix(b, integers, scale, stored)
    sizes = [shape[axis] for axis in (*stored.summed, *channels)]
    name = b.node("Reshape", [name, b.ints(sizes)])
    return b.ordered(Value(name, shape, (*stored.summed, *channels)), order)


def is_matrix(stored: Stored, given: Contraction, side: int) -> bool:
    """Whether a dot reads the weight at `side` as a matrix whose rows are what it sums over."""
    own = given.operands[side]
    is_plain = given.is_dot and not given.has_batch and given.choosing is None
    return is_plain and set(own.contracted) == set(stored.summed)


def dot(
    b: Builder,
    given: Contraction,
    side: int,
    x: Value,
    stored: Stored,
    shape: tuple[Size, ...],
    is_onnxruntime: bool,
) -> Value:
    """A dot of `x`, the operand at `side`, with a stored matrix.

    Args:
      b: the graph.
      given: the dot.
      side: of the operand that is no weight.
      x: that operand, with all its copies.
      stored: the weight.
      shape: of the result.
      is_onnxruntime: whether no other runtime reads the file.
    """
    own, weight = given.operands[side], given.operands[1 - side]
    pairs = dict(zip(weight.contracted, own.contracted, strict=True))
    x = b.ordered(x, (*own.free, *(pairs[axis] for axis in stored.summed)))
    integers, scale = stored.matrix(weight.free)
    rows = [x.shape[axis] for axis in own.free]
    name = x.name
    if len(stored.summed) != 1:
        name = b.reshape(name, x.physical, [*rows, len(integers)])
    packed = _packed(integers, scale, stored) if is_onnxruntime else None
    if packed is None:
        name = b.node("MatMul", [name, _matrix(b, integers, scale, stored)])
    else:
        words, scales, attributes = packed
        if stored.is_shared and words.size == integers.size:
            table = b.constant(words.reshape(len(words), -1), "table")
            weight_name = b.reshaped_constant(table, words.shape)
        else:
            weight_name = b.constant(words, "weight_uint8")
        inputs = [name, weight_name, b.constant(scales, "weight_scale")]
        name = b.node("MatMulNBits", inputs, domain=_CONTRIBUTED, **attributes)
    return contraction.of_rows(b, given, side, name, shape)


def _matrix(b: Builder, integers: np.ndarray, scale: np.ndarray, stored: Stored) -> str:
    """A matrix [K, N] in float of its integers and their scales [G, N]."""
    turned = stored.is_shared
    if len(scale) == 1:
        return _dequantize(b, integers, scale[0], stored.bits, 1, turned)
    size = stored.layout.size
    return _dequantize(b, integers, scale, stored.bits, 0, turned, block_size=size)


def _dequantize(
    b: Builder,
    integers: np.ndarray,
    scale: np.ndarray,
    bits: int,
    axis: int,
    turned: bool = False,
    **block: int,
) -> str:
    """Integers times their scales; with `turned`, a matrix that is in the file transposed."""
    if (bits == 4 or block) and b.opset < BLOCKS_SINCE:
        what = "of 4 bits" if bits == 4 else "with scales for groups of a channel"
        raise NotCovered(f"weights {what} before opset {BLOCKS_SINCE}")
    stored = integers.astype(_FOUR_BITS) if bits == 4 else integers
    if turned:
        name = b.transposed_constant(stored, "table")
    else:
        name = b.constant(stored, f"weight_int{bits}")
    with b.outermost():  # a loop reads the float: once for all its steps
        names = [name, b.constant(scale, "weight_scale")]
        return b.node("DequantizeLinear", names, "weight", axis=axis, **block)


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
    if size < 16 or size & (size - 1):
        return None
    blocks, zero = len(scale), 1 << (bits - 1)
    digits = np.full((columns, blocks * size), zero, np.uint8)
    digits[:, :rows] = (integers.T.astype(np.int16) + zero).astype(np.uint8)
    padded: np.ndarray = digits[:, ::2] | (digits[:, 1::2] << 4) if bits == 4 else digits
    words = padded.reshape(columns, blocks, size * bits // 8)
    attributes = {"K": rows, "N": columns, "bits": bits, "block_size": size, "accuracy_level": 1}
    return words, np.ascontiguousarray(scale.T), attributes
