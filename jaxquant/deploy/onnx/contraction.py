"""Convolutions and dots, of floats or of dequantized values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx.builder import Builder, Value, straight
from jaxquant.deploy.onnx.errors import NotCovered
from jaxquant.deploy.onnx.nodes import Size


@dataclasses.dataclass(frozen=True)
class ConvForm:
    """How a JAX convolution becomes Conv or ConvTranspose.

    Attributes:
      op: the ONNX operator.
      attributes: its attributes.
      kernel_order: the axes of the JAX kernel in the order of the ONNX one.
      flipped: the spatial axes of the ONNX kernel that run backwards.
      channel_axis: the axis of the ONNX kernel with the output channels.
    """

    op: str
    attributes: dict[str, Any]
    kernel_order: tuple[int, ...]
    flipped: tuple[int, ...]
    channel_axis: int

    def kernel(self, array: np.ndarray) -> np.ndarray:
        """The ONNX kernel from the JAX kernel."""
        return np.flip(array.transpose(self.kernel_order), self.flipped)


def flipped_kernel(b: Builder, form: ConvForm, kernel: Value) -> str:
    """The ONNX kernel of a convolution whose kernel runs backwards; it may be computed."""
    kernel = b.ordered(kernel, form.kernel_order)
    if kernel.name in b.arrays:
        return b.constant(np.flip(b.arrays[kernel.name], form.flipped))
    count = len(form.flipped)
    bounds = ([-1] * count, [-(2**31)] * count, form.flipped, [-1] * count)
    return b.node("Slice", [kernel.name, *map(b.ints, bounds)])


def is_pointwise(form: ConvForm) -> bool:
    """True for a convolution that looks at one position at a time."""
    a = form.attributes
    ones = {*a["kernel_shape"], a["group"]} == {1}
    return form.op == "Conv" and ones and not any(a["pads"])


def conv_form(node: Node, kernel_shape: Sequence[int]) -> ConvForm:
    """The form of a convolution with a kernel of this (JAX) shape.

    Raises:
      NotCovered: ONNX has no such convolution.
    """
    params, spec = node.params, node.params["dimension_numbers"]["rhs_spec"]
    outputs, inputs, *spatial = spec
    if params.get("batch_group_count", 1) != 1:
        raise NotCovered("a convolution with batch groups")
    if not spatial:
        raise NotCovered("a convolution without spatial axes")
    sizes = [kernel_shape[axis] for axis in spatial]
    padding = [tuple(pads) for pads in params["padding"]]
    if any(not isinstance(pad, int) for pads in padding for pad in pads):
        raise NotCovered("padding that depends on a size that varies")
    attributes: dict[str, Any] = {
        "kernel_shape": sizes,
        "dilations": list(params["rhs_dilation"]),
        "group": params["feature_group_count"],
    }
    if all(d == 1 for d in params["lhs_dilation"]):
        if any(pad < 0 for pads in padding for pad in pads):
            raise NotCovered("a convolution with negative padding")
        attributes["strides"] = list(params["window_strides"])
        attributes["pads"] = [low for low, _ in padding] + [high for _, high in padding]
        return ConvForm("Conv", attributes, (outputs, inputs, *spatial), (), 0)
    if any(s != 1 for s in params["window_strides"]) or params["feature_group_count"] != 1:
        raise NotCovered("a transposed convolution with strides or groups")
    # The convolution of a dilated input is the gradient of one with that stride: its padding is
    # what the flipped kernel reaches over the edge beyond the padding here.
    reach = [(size - 1) * d for size, d in zip(sizes, params["rhs_dilation"], strict=True)]
    pads = [(r - low, r - high) for r, (low, high) in zip(reach, padding, strict=True)]
    if any(low < 0 for low, _ in pads):
        raise NotCovered("a transposed convolution with so much padding")
    attributes["strides"] = list(params["lhs_dilation"])
    attributes["pads"] = [low for low, _ in pads] + [max(high, 0) for _, high in pads]
    beyond = [max(-high, 0) for _, high in pads]
    if any(extra >= stride for extra, stride in zip(beyond, attributes["strides"])):
        raise NotCovered("a transposed convolution with so much padding")
    if any(beyond):
        attributes["output_padding"] = beyond
    axes = tuple(range(2, 2 + len(spatial)))
    return ConvForm("ConvTranspose", attributes, (inputs, outputs, *spatial), axes, 1)


def conv(
    b: Builder,
    node: Node,
    form: ConvForm,
    x: Value,
    kernel: str,
    bias: str | None,
    shape: tuple[Size, ...],
) -> Value:
    """A convolution with a kernel in ONNX's layout."""
    spec = node.params["dimension_numbers"]
    x = b.ordered(x, spec["lhs_spec"])
    inputs = [x.name, kernel] + ([bias] if bias else [])
    return Value(b.node(form.op, inputs, **form.attributes), shape, tuple(spec["out_spec"]))


@dataclasses.dataclass(frozen=True)
class DotForm:
    """The axes of both operands of a dot by their part: batch, free, contracted."""

    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]

    def order(self, side: int, last: str) -> tuple[int, ...]:
        """The axes of an operand with its free or its contracted ones last."""
        free, contracted = self.free[side], self.contracted[side]
        rest = free + contracted if last == "contracted" else contracted + free
        return (*self.batch[side], *rest)


def dot_form(node: Node, ranks: tuple[int, int]) -> DotForm:
    contracted, batch = node.params["dimension_numbers"]
    taken = [set(contracted[side]) | set(batch[side]) for side in (0, 1)]
    free = [tuple(a for a in range(ranks[side]) if a not in taken[side]) for side in (0, 1)]
    return DotForm(
        (tuple(batch[0]), tuple(batch[1])),
        (free[0], free[1]),
        (tuple(contracted[0]), tuple(contracted[1])),
    )


def weighted_dot(
    b: Builder,
    form: DotForm,
    side: int,
    x: Value,
    weight: str,
    bias: str | None,
    shape: tuple[Size, ...],
) -> Value:
    """A dot without batch axes: `x`, the operand at `side`, with a weight [K, N]."""
    free, outputs = form.free[side], form.free[1 - side]
    x = b.ordered(x, (*free, *form.contracted[side]))
    sizes = [x.shape[axis] for axis in free]
    if len(form.contracted[side]) != 1:
        width = math.prod(int(x.shape[axis]) for axis in form.contracted[side])
        name = b.node("Reshape", [x.name, b.shape([*sizes, width])])
    else:
        name = x.name
    if len(free) == 1:
        name = b.node("Gemm", [name, weight] + ([bias] if bias else []))
    else:
        name = b.node("MatMul", [name, weight])
        if bias:
            name = b.node("Add", [name, bias])
    start = 0 if side == 0 else len(outputs)  # where the axes of x are in the result
    order = tuple(start + k for k in range(len(free)))
    order += tuple((len(free) if side == 0 else 0) + k for k in range(len(outputs)))
    if len(outputs) != 1:
        name = b.node("Reshape", [name, b.shape([shape[axis] for axis in order])])
    return Value(name, shape, order)


def dot(b: Builder, form: DotForm, values: Sequence[Value], shape: tuple[Size, ...]) -> Value:
    """A dot of two tensors: batch axes, free axes of the first, free axes of the second."""
    names = []
    for side, value in enumerate(values):
        order = form.order(side, "contracted" if side == 0 else "free")
        value = b.ordered(value, order)
        batch = [value.shape[axis] for axis in form.batch[side]]
        free = [value.shape[axis] for axis in form.free[side]]
        contracted = [value.shape[axis] for axis in form.contracted[side]]
        name = value.name
        if len(free) != 1 or len(contracted) != 1:
            rows, columns = (free, contracted) if side == 0 else (contracted, free)
            name = b.node("Reshape", [name, b.shape([*batch, _product(rows), _product(columns)])])
        names.append(name)
    name = b.node("MatMul", names)
    if any(len(form.free[side]) != 1 for side in (0, 1)):
        name = b.node("Reshape", [name, b.shape(shape)])
    return Value(name, shape, straight(len(shape)))


def _product(sizes: Sequence[Size]) -> Size:
    varying = [size for size in sizes if isinstance(size, str)]
    if len(varying) == 1 and len(sizes) == 1:
        return varying[0]
    if varying:
        return "*".join(f"({size})" for size in sizes)
    return math.prod(int(size) for size in sizes)
