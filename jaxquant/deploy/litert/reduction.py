"""Reductions along axes and over windows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxquant.deploy.litert import elementwise, moving
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.network import Node

_REDUCTIONS = {
    "reduce_and": "REDUCE_ALL",
    "reduce_max": "REDUCE_MAX",
    "reduce_min": "REDUCE_MIN",
    "reduce_or": "REDUCE_ANY",
    "reduce_prod": "REDUCE_PROD",
    "reduce_sum": "SUM",
}
_INDICES = {"argmax": "ARG_MAX", "argmin": "ARG_MIN"}
_WINDOWS = ("reduce_window_max", "reduce_window_sum")
OPERATIONS = frozenset((*_REDUCTIONS, *_INDICES, *_WINDOWS, "cumsum"))


def emit(builder: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """The result of a reduction, of int8 where it picks: it is on the operand's grid."""
    if node.op == "reduce_window_max":
        return max_pool(builder, node, value, shape)
    if node.op == "reduce_window_sum":
        return _window_sum(builder, node, value, shape)
    # A negative factor would make the least the largest, so it is multiplied in first.
    value = builder.plain(value)
    if node.op in _INDICES:
        return _index(builder, node, value, shape)
    if node.op == "cumsum":
        axis = builder.constant(np.int32(value.axis(node.params["axis"])), "axis")
        settings = {"Exclusive": False, "Reverse": bool(node.params.get("reverse"))}
        name = builder.alike("CUMSUM", value, [axis], value.physical, "CumsumOptions", **settings)
        return dataclasses.replace(value, name=name)
    axes = tuple(node.params["axes"])
    return along(
        builder, _REDUCTIONS[node.op], value, axes, shape, builder.dtype(value), builder.grid(value)
    )


def along(
    builder: Builder,
    op: str,
    value: Value,
    axes: Sequence[int],
    shape: tuple[Size, ...],
    dtype: str = "float32",
    grid: Grid | None = None,
) -> Value:
    """A reduction along logical axes, which the result does not have."""
    # Axes are named as they lie in memory, so no transpose is needed.
    order = _remaining(value, axes)
    places = builder.ints(sorted(value.axis(axis) for axis in axes), "axes")
    physical = [shape[axis] for axis in order]
    names = [value.name, places]
    name = builder.op(op, names, physical, dtype, grid, "ReducerOptions", KeepDims=False)
    return Value(name, shape, order)


def _remaining(value: Value, axes: Sequence[int]) -> tuple[int, ...]:
    """The physical order once some logical axes are gone."""
    kept = [axis for axis in range(value.rank) if axis not in axes]
    return tuple(kept.index(axis) for axis in value.order if axis not in axes)


def _index(builder: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    (axis,) = node.params["axes"]
    order = _remaining(value, (axis,))
    names = [value.name, builder.constant(np.int32(value.axis(axis)), "axis")]
    op, physical = _INDICES[node.op], [shape[a] for a in order]
    options = "ArgMaxOptions" if node.op == "argmax" else "ArgMinOptions"
    # int32 here, as all of the runtime's integers that tell places.
    name = builder.op(op, names, physical, "int32", None, options, OutputType="int32")
    dtype = elementwise.litert_dtype(str(node.params["index_dtype"]))
    return elementwise.cast(builder, Value(name, shape, order), dtype)


@dataclasses.dataclass(frozen=True)
class Window:
    """Windows along two axes of a tensor that lies as [batch, height, width, channels].

    Attributes:
      value: the tensor; of one with one axis of positions the height is left away.
      sizes, strides, dilation: along height and width.
      padding: likewise, (before, after).
    """

    value: Value
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def wide(self) -> Window:
        """The same with a height of 1 where the windows are along one axis."""
        if len(self.sizes) == 2:
            return self
        one = (1,)
        return Window(
            self.value,
            one + self.sizes,
            one + self.strides,
            one + self.dilation,
            ((0, 0), *self.padding),
        )

    def pooled(self) -> dict[str, int]:
        """The options of a pooling."""
        return {
            "StrideH": self.strides[0],
            "StrideW": self.strides[1],
            "FilterHeight": self.sizes[0],
            "FilterWidth": self.sizes[1],
        }


def window_of(builder: Builder, node: Node, value: Value) -> Window:
    """The windows of a pooling operation."""
    params = node.params
    if any(d != 1 for d in params["base_dilation"]):
        raise NotCovered("a window over a dilated tensor")
    padding = [tuple(pads) for pads in params["padding"]]
    rows = zip(params["window_dimensions"], params["window_strides"], padding, strict=True)
    # Axes that a window does not touch; the first and the last of them are batch and channels.
    still = [axis for axis, setting in enumerate(rows) if setting == (1, 1, (0, 0))]
    # A pool has one or two axes of windows, and batch and channels beside them.
    if value.rank not in (3, 4) or len(still) < 2:
        raise NotCovered(f"windows along {value.rank - len(still)} of {value.rank} axes")
    batch, channels = still[0], still[-1]
    axes = [axis for axis in range(value.rank) if axis not in (batch, channels)]
    value = builder.ordered(value, (batch, *axes, channels))

    def along(key: str) -> tuple[int, ...]:
        return tuple(params[key][axis] for axis in axes)

    return Window(
        value,
        along("window_dimensions"),
        along("window_strides"),
        along("window_dilation"),
        tuple((padding[axis][0], padding[axis][1]) for axis in axes),
    ).wide()


def max_pool(builder: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """Maximum pooling, of floats or of int8; what is padded is never the largest."""
    window = window_of(builder, node, builder.plain(value))
    # The kernel has no dilation.
    if window.dilation != (1, 1):
        raise NotCovered("the maximum of a dilated window")
    wide, padding = padded_for(builder, window, -np.inf)
    order = window.value.order
    physical = four([shape[axis] for axis in order])
    name = builder.alike(
        "MAX_POOL_2D", wide, [], physical, "Pool2DOptions", Padding=padding, **window.pooled()
    )
    return narrowed(builder, name, shape, order)


def _window_sum(builder: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """A sum over windows, with what is padded: an average, times how many it is of."""
    window = window_of(builder, node, value)
    if window.dilation != (1, 1):
        raise NotCovered("the sum of a dilated window")
    # The runtime's SAME averages over what lies inside alone; zeros that are there are counted.
    wide, _ = padded_for(builder, window, 0.0, may_be_same=False)
    order = window.value.order
    physical = four([shape[axis] for axis in order])
    settings = {**window.pooled(), "Padding": "VALID"}
    name = builder.op(
        "AVERAGE_POOL_2D", [wide.name], physical, "float32", None, "Pool2DOptions", **settings
    )
    # The factor goes on with the value, into whatever multiplies next.
    factor = value.factor * math.prod(window.sizes)
    return dataclasses.replace(narrowed(builder, name, shape, order), factor=factor)


def padded_for(
    builder: Builder, window: Window, fill: float, may_be_same: bool = True
) -> tuple[Value, str]:
    """The tensor of four axes that the windows go over, and the runtime's name for the padding.

    Where the runtime has no name for it, the tensor is padded with `fill` before.
    """
    value = window.value
    physical = four(list(value.physical))
    # The caller gives the factor on to the result.
    value = Value(
        builder.reshape(dataclasses.replace(value, factor=1.0), physical),
        tuple(physical),
        (0, 1, 2, 3),
    )
    # SAME and VALID are what the operators know; anything else is padded beforehand.
    name = padding_name(window, physical[1:3])
    if name == "VALID" or (name == "SAME" and may_be_same):
        return value, name
    pads = {1: window.padding[0], 2: window.padding[1]}
    sizes = tuple(
        size if isinstance(size, str) else size + sum(pads.get(axis, (0, 0)))
        for axis, size in enumerate(physical)
    )
    return moving.padded(builder, value, pads, sizes, fill), "VALID"


def padding_name(window: Window, sizes: Sequence[Size]) -> str:
    """ "VALID" or "SAME", the runtime's two kinds of padding; "" where it is neither."""
    if not any(map(any, window.padding)):
        return "VALID"
    if any(isinstance(size, str) for size in sizes):
        return ""
    same = []
    for axis, size in enumerate(map(int, sizes)):
        # TensorFlow's rule: what the last window lacks, half before and the odd one behind.
        stride, reach = window.strides[axis], (window.sizes[axis] - 1) * window.dilation[axis] + 1
        total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        same.append((total // 2, total - total // 2))
    return "SAME" if list(window.padding) == same else ""


def four(physical: list[Size]) -> list[Size]:
    """The sizes with an axis of height where there is none."""
    return physical if len(physical) == 4 else [physical[0], 1, *physical[1:]]


def narrowed(builder: Builder, name: str, shape: tuple[Size, ...], order: tuple[int, ...]) -> Value:
    """The result of a window, with the axes that the model has."""
    physical = [shape[axis] for axis in order]
    wide = tuple(four(physical))
    return Value(builder.reshape(Value(name, wide, (0, 1, 2, 3)), physical), shape, order)
