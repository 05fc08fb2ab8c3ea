"""Primitives that move values: reshape, transpose, broadcast, slice, pad, concatenate, ...

They hand on floats, whole numbers and int8 alike; of int8 the result is on the operand's grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, kept_order, spread_shapes
from jaxquant.deploy.network import Node

Shape = tuple[Size, ...]
Emit = Callable[[Builder, Node, list[Value], Shape], Value]


def _transpose(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    permutation = list(node.params["permutation"])
    # Nothing is moved: the axes are called otherwise, and the order in memory stays.
    order = tuple(permutation.index(axis) for axis in x[0].order)
    sizes = tuple(x[0].shape[axis] for axis in permutation)
    return dataclasses.replace(x[0], shape=sizes, order=order)


def _reshape(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    if node.params.get("dimensions") is not None:
        raise NotCovered("a reshape with dimensions")
    return resized(builder, x[0], shape)


def resized(builder: Builder, value: Value, shape: Shape) -> Value:
    """A reshape; where only axes of size 1 come and go, the others keep their order in memory."""
    if (order := kept_order(value, shape)) is None:
        return builder.reshaped(value, shape)
    value = builder.plain(value)
    return Value(builder.reshape(value, [shape[axis] for axis in order]), shape, order)


def _broadcast(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    """Axes of size 1 where the result holds copies; whoever needs the copies makes them."""
    sizes: list[Size] = [1] * len(shape)
    for axis, target in enumerate(node.params["broadcast_dimensions"]):
        sizes[target] = x[0].shape[axis]
    return resized(builder, x[0], tuple(sizes))


def _squeeze(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    dropped = node.params["dimensions"]
    return resized(
        builder, x[0], tuple(n for axis, n in enumerate(x[0].shape) if axis not in dropped)
    )


def _slice(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or [1] * x[0].rank
    cuts = {}
    for axis, size in enumerate(x[0].shape):
        if (starts[axis], limits[axis], strides[axis]) != (0, size, 1):
            # Open at the end where all is taken: the size may be one that varies.
            end = None if limits[axis] == size else limits[axis]
            cuts[axis] = (starts[axis], end, strides[axis])
    return sliced(builder, x[0], cuts, shape)


def sliced(
    builder: Builder, value: Value, cuts: Mapping[int, tuple[int, int | None, int]], shape: Shape
) -> Value:
    """Slice some logical axes: (start, end, step), None for an end of the tensor's own."""
    if not cuts:
        return value
    value, begins, ends, steps, to_end = builder.plain(value), [], [], [], 0
    for position, axis in enumerate(value.order):
        start, end, step = cuts.get(axis, (0, None, 1))
        if isinstance(start, str) or isinstance(end, str):
            raise NotCovered("a slice whose bounds depend on a size that varies")
        begins.append(start)
        ends.append(0 if end is None else end)
        steps.append(step)
        # A mask and no number: the size may be one that varies.
        to_end |= (end is None) << position
    bounds = [builder.ints(numbers, "bounds") for numbers in (begins, ends, steps)]
    physical = [shape[axis] for axis in value.order]
    name = builder.alike(
        "STRIDED_SLICE", value, bounds, physical, "StridedSliceOptions", EndMask=to_end
    )
    return dataclasses.replace(value, name=name, shape=shape)


def _rev(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    value = builder.plain(x[0])
    axes = builder.ints([value.axis(axis) for axis in node.params["dimensions"]], "axes")
    name = builder.alike("REVERSE_V2", value, [axes], value.physical, "ReverseV2Options")
    return dataclasses.replace(value, name=name)


def _pad(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    value, fill = builder.plain(x[0]), builder.array(x[1].name)
    config = [tuple(pads) for pads in node.params["padding_config"]]
    if any(isinstance(number, str) for pads in config for number in pads):
        raise NotCovered("padding that depends on a size that varies")
    if fill is None:
        raise NotCovered("padding with a number that the model computes")
    # Spread first: padding counts in what is spread.
    for axis, (_, _, between) in enumerate(config):
        if between:
            value = _spread(builder, value, axis, between, float(fill))
    # Negative padding cuts; what is spread has one gap too many behind its last element.
    ends = [(before, after - between) for before, after, between in config]
    pads = {axis: (max(low, 0), max(high, 0)) for axis, (low, high) in enumerate(ends)}
    if any(map(any, pads.values())):
        wide = tuple(
            size if isinstance(size, str) else size + sum(pads[axis])
            for axis, size in enumerate(value.shape)
        )
        value = padded(builder, value, pads, wide, float(fill))
    cuts = {
        axis: (max(-low, 0), high if high < 0 else None, 1)
        for axis, (low, high) in enumerate(ends)
        if low < 0 or high < 0
    }
    return sliced(builder, value, cuts, shape)


def _spread(builder: Builder, value: Value, axis: int, between: int, fill: float) -> Value:
    """So many elements behind each along an axis: those of a new axis, which goes into it."""
    apart, wide, shape = spread_shapes(value.shape, axis, between)
    value = padded(builder, builder.reshaped(value, apart), {axis + 1: (0, between)}, wide, fill)
    return builder.reshaped(value, shape)


def padded(
    builder: Builder,
    value: Value,
    pads: Mapping[int, tuple[int, int]],
    shape: Shape,
    fill: float = 0.0,
) -> Value:
    """Pad logical axes with a number (before, after); int8 with the integer that stands for it."""
    table = builder.ints([pads.get(axis, (0, 0)) for axis in value.order], "pads")
    physical, grid = [shape[axis] for axis in value.order], builder.grid(value)
    # Without a number of its own the runtime pads with the zero point.
    if fill == 0:
        name = builder.alike("PAD", value, [table], physical, "PadOptions")
    else:
        dtype = builder.dtype(value)
        number = fill if grid is None else grid.integer(fill)
        constant = builder.constant(np.asarray(number, dtype), "fill", grid)
        name = builder.alike("PADV2", value, [table, constant], physical, "PadV2Options")
    return dataclasses.replace(value, name=name, shape=shape)


def _concatenate(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    # In the first one's order in memory, so that it at least need not move.
    leader = x[0]
    values = [builder.ordered(value, leader.order) for value in x]
    physical = [shape[a] for a in leader.order]
    settings = {"Axis": leader.axis(node.params["dimension"])}
    others = [value.name for value in values[1:]]
    name = builder.alike(
        "CONCATENATION", values[0], others, physical, "ConcatenationOptions", **settings
    )
    return Value(name, shape, leader.order)


def _tile(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    value = builder.plain(x[0])
    repeats = [node.params["reps"][axis] for axis in value.order]
    if any(isinstance(count, str) for count in repeats):
        raise NotCovered("copies of a number that varies")
    physical = [shape[axis] for axis in value.order]
    name = builder.alike("TILE", value, [builder.ints(repeats, "repeats")], physical)
    return dataclasses.replace(value, name=name, shape=shape)


def _stack(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    axis = node.params["axis"]
    single = (*shape[:axis], 1, *shape[axis + 1 :])
    parts = [resized(builder, value, single) for value in x]
    return _concatenate(
        builder, dataclasses.replace(node, params={"dimension": axis}), parts, shape
    )


def _iota(builder: Builder, node: Node, x: list[Value], shape: Shape) -> Value:
    axis, dtype = node.params["dimension"], str(node.params["dtype"])
    size = shape[axis]
    if isinstance(size, str):
        raise NotCovered("counting along an axis whose size varies")
    sizes = [1] * len(shape)
    sizes[axis] = size
    # Of size 1 along all other axes: whoever needs the copies makes them.
    return builder.named(np.arange(size, dtype=dtype).reshape(sizes), "iota")


TABLE: dict[str, Emit] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "expand_dims": _reshape,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
}


def split(builder: Builder, node: Node, x: list[Value], shapes: Sequence[Shape]) -> list[Value]:
    """Several slices along one axis."""
    axis, start, found = node.params["axis"], 0, []
    if any(isinstance(size, str) for size in node.params["sizes"]):
        raise NotCovered("a split into sizes that vary")
    # The runtime's split wants equal parts; slices take any.
    for size, shape in zip(node.params["sizes"], shapes, strict=True):
        found.append(sliced(builder, x[0], {axis: (start, start + size, 1)}, shape))
        start += size
    return found


def unstack(builder: Builder, node: Node, x: list[Value], shapes: Sequence[Shape]) -> list[Value]:
    """The slices of size 1 along an axis, without it."""
    axis, found = node.params["axis"], []
    for place, shape in enumerate(shapes):
        single = (*shape[:axis], 1, *shape[axis:])
        found.append(
            resized(builder, sliced(builder, x[0], {axis: (place, place + 1, 1)}, single), shape)
        )
    return found


SEVERAL = {"split": split, "unstack": unstack}
