"""Primitives that move values: reshape, transpose, broadcast, slice, pad, concatenate, ..."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, kept_order, spread_shapes, straight
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import whole_numbers
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.elementwise import cast, onnx_dtype

Emit = Callable[[Builder, Node, list[Value], tuple[Size, ...]], Value]


def _transpose(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    permutation = list(node.params["permutation"])
    order = tuple(permutation.index(axis) for axis in x[0].order)
    sizes = tuple(x[0].shape[axis] for axis in permutation)
    # Nothing is moved: the axes are called otherwise, and the order in memory stays.
    return dataclasses.replace(x[0], shape=sizes, order=order)


def _reshape(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    value = x[0]
    if node.params.get("dimensions") is not None:
        raise NotCovered("a reshape with dimensions")
    if (order := kept_order(value, shape)) is None:
        return builder.reshaped(value, shape)
    value = builder.plain(value)
    sizes = [shape[axis] for axis in order]
    if list(value.physical) == sizes:
        return Value(value.name, shape, order)
    return Value(builder.reshape(value.name, value.physical, sizes), shape, order)


def _broadcast(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """Axes of size 1 where the result holds copies; whoever needs the copies makes them."""
    mapping = list(node.params["broadcast_dimensions"])
    sizes: list[Size] = [1] * len(shape)
    for axis, target in enumerate(mapping):
        sizes[target] = x[0].shape[axis]
    return _reshape(builder, dataclasses.replace(node, params={}), x, tuple(sizes))


def _squeeze(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    dropped = node.params["dimensions"]
    sizes = tuple(size for axis, size in enumerate(x[0].shape) if axis not in dropped)
    return _reshape(builder, dataclasses.replace(node, params={}), x, sizes)


def _slice(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or [1] * x[0].rank
    cuts = []
    for axis, size in enumerate(x[0].shape):
        whole = (starts[axis], limits[axis], strides[axis]) == (0, size, 1)
        # A size that varies is its own limit where all is taken.
        if not whole and not (isinstance(size, str) and starts[axis] == 0 and limits[axis] == size):
            cuts.append((axis, starts[axis], limits[axis], strides[axis]))
        elif strides[axis] != 1:
            cuts.append((axis, 0, 2**31 - 1, strides[axis]))
    return sliced(builder, x[0], cuts, shape)


def sliced(
    builder: Builder,
    value: Value,
    cuts: Sequence[tuple[int, Size, Size, int]],
    shape: tuple[Size, ...],
) -> Value:
    """Slice (axis, start, end, step) of logical axes."""
    if not cuts:
        return value
    value = builder.plain(value)
    # By axis: those that are whole need no bounds, which might vary.
    axes = builder.ints([value.axis(axis) for axis, *_ in cuts])
    starts, ends, steps = (_numbers(builder, [cut[k] for cut in cuts]) for k in (1, 2, 3))
    name = builder.node("Slice", [value.name, starts, ends, axes, steps])
    return dataclasses.replace(value, name=name, shape=shape)


def _numbers(builder: Builder, numbers: Sequence[Size]) -> str:
    """Numbers, of which some are sizes that vary, as one tensor."""
    if not any(isinstance(number, str) for number in numbers):
        return builder.ints([int(number) for number in numbers])
    names = [
        whole_numbers.name_of(builder, whole_numbers.of_size(builder, number)) for number in numbers
    ]
    return builder.node("Concat", names, axis=0)


def _rev(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    # From the last to before the first, so far that no size reaches it.
    cuts = [(axis, -1, -(2**31), -1) for axis in node.params["dimensions"]]
    return sliced(builder, x[0], cuts, shape)


def _pad(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    value, fill = builder.plain(x[0]), x[1]
    config = [tuple(pads) for pads in node.params["padding_config"]]
    if any(isinstance(number, str) for pads in config for number in pads):
        raise NotCovered("padding that depends on a size that varies")
    for axis, (_, _, between) in enumerate(config):
        if between:
            value = _spread(builder, value, axis, between, fill.name)
    # Spreading left a gap behind the last element too.
    ends = [(before, after - between) for before, after, between in config]
    if any(low > 0 or high > 0 for low, high in ends):
        pads = {axis: (max(low, 0), max(high, 0)) for axis, (low, high) in enumerate(ends)}
        value = _padded(builder, value, pads, fill.name, shape)
    cuts = [
        (axis, max(-low, 0), high if high < 0 else 2**31 - 1, 1)
        for axis, (low, high) in enumerate(ends)
        if low < 0 or high < 0
    ]
    return sliced(builder, value, cuts, shape)


def _spread(builder: Builder, value: Value, axis: int, between: int, fill: str) -> Value:
    """So many elements behind each along an axis: those of a new axis, which goes into it."""
    apart, wide, shape = spread_shapes(value.shape, axis, between)
    value = _padded(builder, builder.reshaped(value, apart), {axis + 1: (0, between)}, fill, wide)
    return builder.reshaped(value, shape)


def _padded(
    builder: Builder,
    value: Value,
    pads: Mapping[int, tuple[int, int]],
    fill: str,
    shape: tuple[Size, ...],
) -> Value:
    """Pad logical axes, (before, after) each."""
    low, high = ([pads.get(axis, (0, 0))[end] for axis in value.order] for end in (0, 1))
    name = builder.node("Pad", [value.name, builder.ints([*low, *high]), fill], mode="constant")
    return dataclasses.replace(value, name=name, shape=shape)


def _concatenate(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    leader = x[0]
    # In the first one's order in memory, so that it at least need not move.
    names = [builder.ordered(value, leader.order).name for value in x]
    name = builder.node("Concat", names, axis=leader.axis(node.params["dimension"]))
    return Value(name, shape, leader.order)


def _tile(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    value = builder.plain(x[0])
    repeats = [node.params["reps"][axis] for axis in value.order]
    name = builder.node("Tile", [value.name, _numbers(builder, repeats)])
    return dataclasses.replace(value, name=name, shape=shape)


def _stack(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """A new axis, physically where it is logically if the operands' axes are in order."""
    leader, new = x[0], node.params["axis"]
    order = tuple(axis + (axis >= new) for axis in leader.order)
    # In any other order it comes last, where no axis of the others has to move.
    at = new if leader.order == straight(leader.rank) else len(order)
    names = [
        builder.node("Unsqueeze", [builder.ordered(value, leader.order).name, builder.ints([at])])
        for value in x
    ]
    return Value(builder.node("Concat", names, axis=at), shape, (*order[:at], new, *order[at:]))


def _iota(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    axis = node.params["dimension"]
    sizes: list[Size] = [1] * len(shape)
    sizes[axis] = shape[axis]
    number = whole_numbers.counted(builder, shape[axis])
    number = whole_numbers.reshaped(builder, number, sizes)
    # Of size 1 along all other axes: whoever needs the copies makes them.
    value = Value(whole_numbers.name_of(builder, number), tuple(sizes), straight(len(shape)))
    return cast(builder, value, onnx_dtype(str(node.params["dtype"])))


def _size_as_value(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """A size of the model as a number: what `x.shape[0] * y` reads."""
    number = whole_numbers.of_size(builder, node.params["dim"])
    name = builder.node("Reshape", [whole_numbers.name_of(builder, number), builder.ints([])])
    return cast(builder, Value(name, (), ()), "int32")


TABLE: dict[str, Emit] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dim_as_value": _size_as_value,
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


def _split(
    builder: Builder,
    node: Node,
    x: list[Value],
    shapes: Sequence[tuple[Size, ...]],
    dtypes: Sequence[str],
) -> list[Value]:
    """Several slices along one axis."""
    value = builder.plain(x[0])
    axis = value.axis(node.params["axis"])
    sizes = _numbers(builder, node.params["sizes"])
    names = builder.split_node("Split", [value.name, sizes], len(shapes), axis=axis)
    return [
        dataclasses.replace(value, name=name, shape=shape)
        for name, shape in zip(names, shapes, strict=True)
    ]


def _unstack(
    builder: Builder,
    node: Node,
    x: list[Value],
    shapes: Sequence[tuple[Size, ...]],
    dtypes: Sequence[str],
) -> list[Value]:
    # The axis is gone from the result: those behind it have numbers one less.
    value, axis = builder.plain(x[0]), node.params["axis"]
    order = tuple(a - (a > axis) for a in value.order if a != axis)
    along = value.axis(axis)
    return [
        Value(
            builder.node(
                "Gather", [value.name, builder.constant(np.int64(k), "index")], axis=along
            ),
            shape,
            order,
        )
        for k, shape in enumerate(shapes)
    ]


# The operations that give several results.
SEVERAL = {"split": _split, "unstack": _unstack}
