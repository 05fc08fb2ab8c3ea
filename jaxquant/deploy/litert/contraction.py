"""Convolutions and dots: int8 on grids, or floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant.deploy.litert import moving
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.litert.reduction import Window, padded_for
from jaxquant.deploy.lower.convolution import ConvForm
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.graph.contraction import Contraction

Shape = tuple[Size, ...]


class Result(NamedTuple):
    """What an operation gives: floats, or int8 on a grid; with an activation fused into it."""

    grid: Grid | None = None
    activation: str = "NONE"

    @property
    def dtype(self) -> str:
        return "float32" if self.grid is None else "int8"


def is_depthwise(form: ConvForm) -> bool:
    """True where each channel is convolved by itself, perhaps with several filters."""
    return not form.is_transposed and form.feature_groups > 1 and form.channels[1] == 1


def kernel(form: ConvForm, array: np.ndarray) -> tuple[np.ndarray, int]:
    """A JAX kernel as the runtime has it, with the axis of its output channels.

    It is [O, H, W, I], and [1, H, W, O] where channels are convolved by themselves; of a
    convolution along one axis H is 1.
    """
    ends = (form.outputs, form.inputs)
    first, last = ends[::-1] if is_depthwise(form) else ends
    stored = form.kernel(array, (first, *form.spatial, last))
    if len(form.spatial) == 1:
        stored = np.expand_dims(stored, 1)
    return stored, stored.ndim - 1 if is_depthwise(form) else 0


def conv(
    builder: Builder,
    given: Contraction,
    form: ConvForm,
    x: Value,
    others: Sequence[str],
    shape: Shape,
    result: Result,
) -> Value:
    """A convolution.

    Args:
      builder: of the graph.
      given: the convolution.
      form: which runtimes have of it.
      x: its input.
      others: the kernel [O, H, W, I], or of a depthwise one [1, H, W, O], and the bias [O].
      shape: of the result.
      result: what it gives.
    """
    own, found = given.operands[0], given.result
    if len(form.window) > 2:
        raise NotCovered("a convolution along more than two axes")
    # Channels last, as the runtime's kernels read their input.
    x = builder.ordered(x, (*own.free, *own.window, *own.contracted))
    order = (*found.free[0], *found.window, *found.free[1])
    # A convolution along one axis is one along two, the other of size 1.
    wide = [1] * (2 - len(form.window))
    sizes = [shape[axis] for axis in order]
    physical = [sizes[0], *wide, *sizes[1:]]
    if form.is_transposed:
        name = _transposed(builder, form, x, others, physical, result)
    else:
        window = Window(x, form.window, form.strides, form.dilation, form.padding).wide()
        filters = form.channels[0] // form.feature_groups if is_depthwise(form) else None
        name = over_windows(builder, window, others, physical, result, filters)
    value = Value(name, tuple(physical), straight(4))
    return Value(builder.reshape(value, sizes), shape, order)


def over_windows(
    builder: Builder,
    window: Window,
    others: Sequence[str],
    physical: Sequence[Size],
    result: Result,
    filters: int | None,
) -> str:
    """A convolution over the windows of a tensor.

    Args:
      builder, others, result: as of `conv`.
      window: what the kernel goes over.
      physical: the sizes of the result, four.
      filters: of each channel, where channels are convolved by themselves; None elsewhere.
    """
    # Of int8 the runtime pads with the zero point, which stands for 0.
    taken, padding = padded_for(builder, window, 0.0)
    settings: dict[str, Any] = {
        "Padding": padding,
        "StrideH": window.strides[0],
        "StrideW": window.strides[1],
        "DilationHFactor": window.dilation[0],
        "DilationWFactor": window.dilation[1],
        "FusedActivationFunction": result.activation,
    }
    op, options = "CONV_2D", "Conv2DOptions"
    if filters is not None:
        op, options = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        settings["DepthMultiplier"] = filters
    names = [taken.name, *others]
    return builder.op(op, names, physical, result.dtype, result.grid, options, **settings)


def _transposed(
    builder: Builder,
    form: ConvForm,
    x: Value,
    others: Sequence[str],
    physical: Sequence[Size],
    result: Result,
) -> str:
    """A transposed convolution: all that its windows reach, and then what is kept of that."""
    # The operator is told the sizes of its result as numbers.
    if any(isinstance(size, str) for size in (*physical[1:], *x.physical[1:])):
        raise NotCovered("a transposed convolution of a size that varies (give `shapes`)")
    if any(d != 1 for d in form.dilation) or len(form.window) != 2:
        raise NotCovered("a transposed convolution that is dilated, or along other than two axes")
    whole, cuts = list(physical), {}
    for axis, (size, stride) in enumerate(zip(form.window, form.strides, strict=True), 1):
        low, _ = form.padding[axis - 1]
        wanted = int(physical[axis])
        # The operator has but two paddings, so everything is computed and the rest cut off.
        whole[axis] = max((int(x.physical[axis]) - 1) * stride + size, low + wanted)
        if (low, whole[axis]) != (0, wanted):
            cuts[axis] = (low, low + wanted, 1)
    sizes = builder.ints([1 if isinstance(size, str) else size for size in whole])
    settings = {
        "Padding": "VALID",
        "StrideH": form.strides[0],
        "StrideW": form.strides[1],
        "FusedActivationFunction": result.activation,
    }
    kernel, *bias = others
    names = [sizes, kernel, x.name, *bias]
    options = "TransposeConvOptions"
    name = builder.op(
        "TRANSPOSE_CONV", names, whole, result.dtype, result.grid, options, **settings
    )
    return moving.sliced(
        builder, Value(name, tuple(whole), straight(4)), cuts, tuple(physical)
    ).name


def dense(
    builder: Builder,
    given: Contraction,
    side: int,
    x: Value,
    others: Sequence[str],
    shape: Shape,
    result: Result,
) -> Value:
    """A dot without batch axes: `x`, the operand at `side`, with a weight [N, K] and a bias [N]."""
    own, channels = given.operands[side], given.operands[1 - side].free
    # Rows keep their axes (KeepNumDims), so that no reshape has to join sizes that vary.
    x = builder.ordered(x, (*own.free, *own.contracted))
    rows = [x.shape[axis] for axis in own.free]
    width = math.prod(int(x.shape[axis]) for axis in own.contracted)
    name = builder.reshape(x, [*(rows or [1]), width])
    (count, _) = builder.tensors[others[0]].shape
    joined = [*(rows or [1]), count]
    settings = {"KeepNumDims": True, "FusedActivationFunction": result.activation}
    if result.grid is None:  # with int8 weights the rows are on grids with zero points
        settings["AsymmetricQuantizeInputs"] = True
    options = "FullyConnectedOptions"
    names = [name, *others]
    name = builder.op(
        "FULLY_CONNECTED", names, joined, result.dtype, result.grid, options, **settings
    )
    start = 0 if side == 0 else len(channels)  # where the axes of x are in the result
    # The result has the rows first, whichever side of the dot they are on.
    order = tuple(start + k for k in range(len(rows)))
    order += tuple((len(rows) if side == 0 else 0) + k for k in range(len(channels)))
    value = Value(name, tuple(joined), straight(len(joined)))
    return Value(builder.reshape(value, [shape[axis] for axis in order]), shape, order)


def dot(
    builder: Builder, given: Contraction, values: Sequence[Value], shape: Shape, result: Result
) -> Value:
    """A dot of two tensors: batch axes, free axes of the first, free axes of the second."""
    names: list[str] = []
    joined: list[Size] = []
    is_turned = False
    for side, (value, own) in enumerate(zip(values, given.operands, strict=True)):
        orders = (*own.batch, *own.free, *own.contracted), (*own.batch, *own.contracted, *own.free)
        # The second factor may lie either way round.
        is_turned = side == 1 and value.order == orders[0]
        value = builder.ordered(value, orders[0] if side == 0 or is_turned else orders[1])
        batch = [value.shape[axis] for axis in own.batch]
        # The kernel knows batch axes and a matrix: all other axes of a kind become one.
        free, contracted = (
            _joined([value.shape[axis] for axis in axes]) for axes in (own.free, own.contracted)
        )
        pair = [free, contracted] if side == 0 or is_turned else [contracted, free]
        names.append(builder.reshape(value, [*batch, *pair]))
        joined.append(free)
    batch = [values[0].shape[axis] for axis in given.operands[0].batch]
    physical = [*batch, *joined]
    settings = {"AdjX": False, "AdjY": is_turned}
    options = "BatchMatMulOptions"
    name = builder.op(
        "BATCH_MATMUL", names, physical, result.dtype, result.grid, options, **settings
    )
    value = Value(name, tuple(physical), straight(len(physical)))
    return Value(builder.reshape(value, shape), shape, straight(len(shape)))


def _joined(sizes: Sequence[Size]) -> Size:
    if len(sizes) == 1:
        return sizes[0]
    if any(isinstance(size, str) for size in sizes):
        raise NotCovered("a dot that joins axes of which one varies (give `shapes`)")
    return math.prod(int(size) for size in sizes)


def no_bias(builder: Builder, channels: int, steps: np.ndarray | None) -> str:
    """A bias of zeros, which kernels ask for: int32 in these steps, or float32."""
    if steps is None:
        return builder.constant(np.zeros(channels, np.float32), "bias")
    return builder.constant(np.zeros(channels, np.int32), "bias", Grid(steps))
