"""Convolutions and dots, of floats or of dequantized values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.convolution import ConvForm
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.graph.contraction import Contraction


def kernel_order(form: ConvForm) -> tuple[int, ...]:
    """The axes of a JAX kernel in the order of the ONNX one."""
    channels = (form.outputs, form.inputs)
    return (*(channels[::-1] if form.is_transposed else channels), *form.spatial)


def flipped_kernel(builder: Builder, form: ConvForm, kernel: Value) -> str:
    """The ONNX kernel of a convolution whose kernel runs backwards; it may be computed."""
    kernel = builder.ordered(kernel, kernel_order(form))
    count = len(form.spatial)
    flipped = tuple(range(2, 2 + count))
    if kernel.name in builder.arrays:
        return builder.constant(np.flip(builder.arrays[kernel.name], flipped))
    # A kernel that is computed is run backwards by a slice with steps of -1.
    bounds = ([-1] * count, [-(2**31)] * count, flipped, [-1] * count)
    return builder.node("Slice", [kernel.name, *map(builder.ints, bounds)])


def conv(
    builder: Builder,
    contraction: Contraction,
    form: ConvForm,
    x: Value,
    others: Sequence[str],
    shape: tuple[Size, ...],
    is_integer: bool = False,
) -> Value:
    """A convolution with a kernel in ONNX's layout.

    Args:
      builder: of the graph.
      contraction: the convolution.
      form: which ONNX has of it.
      x: its input.
      others: what it reads beside that: the kernel, and its bias if it has one.
      shape: of the result.
      is_integer: it is a ConvInteger; behind the kernel come both zero points.
    """
    result = contraction.result
    x = builder.ordered(x, input_order(contraction))
    order = (*result.free[0], *result.free[1], *result.window)
    attributes: dict[str, Any] = {
        "kernel_shape": list(form.window),
        "strides": list(form.strides),
        "pads": [low for low, _ in form.padding] + [high for _, high in form.padding],
        "dilations": list(form.dilation),
        "group": form.feature_groups,
    }
    # Rows at the end that no window of the input reaches, and the result has all the same.
    if any(form.beyond):
        attributes["output_padding"] = list(form.beyond)
    op = "ConvTranspose" if form.is_transposed else "ConvInteger" if is_integer else "Conv"
    return Value(builder.node(op, [x.name, *others], **attributes), shape, order)


def input_order(contraction: Contraction) -> tuple[int, ...]:
    """The axes of a convolution's input in ONNX's order: samples, channels, positions."""
    own = contraction.operands[0]
    return (*own.free, *own.contracted, *own.window)


def weighted_dot(
    builder: Builder,
    contraction: Contraction,
    side: int,
    x: Value,
    weight: str,
    bias: str | None,
    shape: tuple[Size, ...],
) -> Value:
    """A dot without batch axes: `x`, the operand at `side`, with a weight [K, N]."""
    own = contraction.operands[side]
    free = own.free
    x = builder.ordered(x, (*free, *own.contracted))
    sizes = [x.shape[axis] for axis in free]

    # Joined, they are the rows of the stored matrix, in the order that both sides have.
    if len(own.contracted) != 1:
        width = math.prod(int(x.shape[axis]) for axis in own.contracted)
        name = builder.reshape(x.name, x.physical, [*sizes, width])
    else:
        name = x.name
    # Gemm takes matrices alone, and its bias; MatMul takes any number of rows' axes.
    if len(free) == 1:
        name = builder.node("Gemm", [name, weight] + ([bias] if bias else []))
    else:
        name = builder.node("MatMul", [name, weight])
        if bias:
            name = builder.node("Add", [name, bias])
    return of_rows(builder, contraction, side, name, shape)


def of_rows(
    builder: Builder, contraction: Contraction, side: int, name: str, shape: tuple[Size, ...]
) -> Value:
    """The result of a dot with a weight, of the product of rows with a matrix.

    Args:
      builder: of the graph.
      contraction: the dot.
      side: that of the operand which is no weight.
      name: the product: the free axes of that operand, and all channels as one.
      shape: of the result.
    """
    free, outputs = contraction.operands[side].free, contraction.operands[1 - side].free
    start = 0 if side == 0 else len(outputs)  # where the axes of x are in the result
    order = tuple(start + k for k in range(len(free)))
    order += tuple((len(free) if side == 0 else 0) + k for k in range(len(outputs)))
    if len(outputs) != 1:
        rows, channels = [shape[axis] for axis in order[: len(free)]], order[len(free) :]
        sizes = [shape[axis] for axis in channels]
        name = builder.reshape(name, [*rows, _joined_size(sizes)], [*rows, *sizes])
    return Value(name, shape, order)


def dot(
    builder: Builder, contraction: Contraction, values: Sequence[Value], shape: tuple[Size, ...]
) -> Value:
    """A dot of two tensors: batch axes, free axes of the first, free axes of the second."""
    names, joined = [], list[Size]()
    for side, (value, own) in enumerate(zip(values, contraction.operands, strict=True)):
        # MatMul sums the last axis of the first with the last but one of the second.
        rest = (*own.free, *own.contracted) if side == 0 else (*own.contracted, *own.free)
        value = builder.ordered(value, (*own.batch, *rest))
        batch = [value.shape[axis] for axis in own.batch]
        free = [value.shape[axis] for axis in own.free]
        contracted = [value.shape[axis] for axis in own.contracted]
        name = value.name
        # MatMul sums over one axis: several are one, in the order that both sides have.
        if len(free) != 1 or len(contracted) != 1:
            rows, columns = (free, contracted) if side == 0 else (contracted, free)
            name = builder.reshape(
                name, value.physical, [*batch, *map(_joined_size, (rows, columns))]
            )
        names.append(name)
        joined.append(_joined_size(free))
    name = builder.node("MatMul", names)
    if any(len(own.free) != 1 for own in contraction.operands):
        batch = list(shape[: len(contraction.operands[0].batch)])
        name = builder.reshape(name, [*batch, *joined], shape)
    return Value(name, shape, straight(len(shape)))


def _joined_size(sizes: Sequence[Size]) -> Size:
    varying = [size for size in sizes if isinstance(size, str)]
    if len(varying) == 1 and len(sizes) == 1:
        return varying[0]
    if varying:
        return "*".join(f"({size})" for size in sizes)
    return math.prod(int(size) for size in sizes)
