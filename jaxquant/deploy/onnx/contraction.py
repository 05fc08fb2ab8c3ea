"""Convolutions and dots, of floats or of dequantized values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.onnx.builder import Builder, Value, straight
from jaxquant.deploy.onnx.errors import NotCovered
from jaxquant.deploy.onnx.nodes import Size
from jaxquant.graph.contraction import Contraction


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


def conv_form(contraction: Contraction, kernel_shape: Sequence[int]) -> ConvForm:
    """The form of a convolution with a kernel of this (JAX) shape.

    Raises:
      NotCovered: ONNX has no such convolution.
    """
    window, own = contraction.window, contraction.operands[1]
    assert window is not None, "a dot is no convolution"
    (outputs,), (inputs,), spatial = own.free, own.contracted, own.window
    if window.batch_groups != 1:
        raise NotCovered("a convolution with batch groups")
    if not spatial:
        raise NotCovered("a convolution without spatial axes")
    sizes = [kernel_shape[axis] for axis in spatial]
    padding = window.padding
    if any(not isinstance(pad, int) for pads in padding for pad in pads):
        raise NotCovered("padding that depends on a size that varies")
    attributes: dict[str, Any] = {
        "kernel_shape": sizes,
        "dilations": list(window.dilation),
        "group": window.groups,
    }
    if all(d == 1 for d in window.input_dilation):
        if any(pad < 0 for pads in padding for pad in pads):
            raise NotCovered("a convolution with negative padding")
        attributes["strides"] = list(window.strides)
        attributes["pads"] = [low for low, _ in padding] + [high for _, high in padding]
        return ConvForm("Conv", attributes, (outputs, inputs, *spatial), (), 0)
    if any(s != 1 for s in window.strides) or window.groups != 1:
        raise NotCovered("a transposed convolution with strides or groups")
    # The convolution of a dilated input is the gradient of one with that stride: its padding is
    # what the flipped kernel reaches over the edge beyond the padding here.
    reach = [(size - 1) * d for size, d in zip(sizes, window.dilation, strict=True)]
    pads = [(r - low, r - high) for r, (low, high) in zip(reach, padding, strict=True)]
    if any(low < 0 for low, _ in pads):
        raise NotCovered("a transposed convolution with so much padding")
    attributes["strides"] = list(window.input_dilation)
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
    contraction: Contraction,
    form: ConvForm,
    x: Value,
    kernel: str,
    bias: str | None,
    shape: tuple[Size, ...],
) -> Value:
    """A convolution with a kernel in ONNX's layout."""
    result = contraction.result
    x = b.ordered(x, input_order(contraction))
    inputs = [x.name, kernel] + ([bias] if bias else [])
    order = (*result.free[0], *result.free[1], *result.window)
    return Value(b.node(form.op, inputs, **form.attributes), shape, order)


def input_order(contraction: Contraction) -> tuple[int, ...]:
    """The axes of a convolution's input in ONNX's order: samples, channels, positions."""
    own = contraction.operands[0]
    return (*own.free, *own.contracted, *own.window)


def weighted_dot(
    b: Builder,
    contraction: Contraction,
    side: int,
    x: Value,
    weight: str,
    bias: str | None,
    shape: tuple[Size, ...],
) -> Value:
    """A dot without batch axes: `x`, the operand at `side`, with a weight [K, N]."""
    own, outputs = contraction.operands[side], contraction.operands[1 - side].free
    free = own.free
    x = b.ordered(x, (*free, *own.contracted))
    sizes = [x.shape[axis] for axis in free]
    if len(own.contracted) != 1:
        width = math.prod(int(x.shape[axis]) for axis in own.contracted)
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


def dot(
    b: Builder, contraction: Contraction, values: Sequence[Value], shape: tuple[Size, ...]
) -> Value:
    """A dot of two tensors: batch axes, free axes of the first, free axes of the second."""
    names = []
    for side, (value, own) in enumerate(zip(values, contraction.operands, strict=True)):
        rest = (*own.free, *own.contracted) if side == 0 else (*own.contracted, *own.free)
        value = b.ordered(value, (*own.batch, *rest))
        batch = [value.shape[axis] for axis in own.batch]
        free = [value.shape[axis] for axis in own.free]
        contracted = [value.shape[axis] for axis in own.contracted]
        name = value.name
        if len(free) != 1 or len(contracted) != 1:
            rows, columns = (free, contracted) if side == 0 else (contracted, free)
            name = b.node("Reshape", [name, b.shape([*batch, _product(rows), _product(columns)])])
        names.append(name)
    name = b.node("MatMul", names)
    if any(len(own.free) != 1 for own in contraction.operands):
        name = b.node("Reshape", [name, b.shape(shape)])
    return Value(name, shape, straight(len(shape)))


def _product(sizes: Sequence[Size]) -> Size:
    varying = [size for size in sizes if isinstance(size, str)]
    if len(varying) == 1 and len(sizes) == 1:
        return varying[0]
    if varying:
        return "*".join(f"({size})" for size in sizes)
    return math.prod(int(size) for size in sizes)
