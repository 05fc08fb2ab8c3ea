"""Primitives that move values: reshape, transpose, broadcast, slice, pad, concatenate, ..."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx.builder import Builder, NotCovered, Size, Value, straight

Emit = Callable[[Builder, Node, list[Value], tuple[Size, ...]], Value]


def _transpose(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    permutation = list(node.params["permutation"])
    order = tuple(permutation.index(axis) for axis in x[0].order)
    sizes = tuple(x[0].shape[axis] for axis in permutation)
    return dataclasses.replace(x[0], shape=sizes, order=order)


def _reshape(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    value = x[0]
    if node.params.get("dimensions") is not None:
        raise NotCovered("a reshape with dimensions")
    before = [axis for axis, size in enumerate(value.shape) if size != 1]
    after = [axis for axis, size in enumerate(shape) if size != 1]
    if [value.shape[a] for a in before] != [shape[a] for a in after]:
        return b.reshaped(value, shape)
    # Only axes of size 1 come and go: the others keep the order that they have.
    target = dict(zip(before, after, strict=True))
    moved = [target[axis] for axis in value.order if axis in target]
    order = tuple(moved + [axis for axis, size in enumerate(shape) if size == 1])
    if moved == sorted(moved):
        order = straight(len(shape))
    value = b.plain(value)
    sizes = [shape[axis] for axis in order]
    if list(value.physical) == sizes:
        return Value(value.name, shape, order)
    return Value(b.node("Reshape", [value.name, b.shape(sizes)]), shape, order)


def _broadcast(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """Axes of size 1 where the result holds copies; whoever needs the copies makes them."""
    mapping = list(node.params["broadcast_dimensions"])
    sizes: list[Size] = [1] * len(shape)
    for axis, target in enumerate(mapping):
        sizes[target] = x[0].shape[axis]
    return _reshape(b, dataclasses.replace(node, params={}), x, tuple(sizes))


def _squeeze(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    dropped = node.params["dimensions"]
    sizes = tuple(size for axis, size in enumerate(x[0].shape) if axis not in dropped)
    return _reshape(b, dataclasses.replace(node, params={}), x, sizes)


def _slice(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    starts, limits = node.params["start_indices"], node.params["limit_indices"]
    strides = node.params["strides"] or [1] * x[0].rank
    cuts = []
    for axis, size in enumerate(x[0].shape):
        whole = (starts[axis], limits[axis], strides[axis]) == (0, size, 1)
        if not whole and not (isinstance(size, str) and starts[axis] == 0 and limits[axis] == size):
            cuts.append((axis, starts[axis], limits[axis], strides[axis]))
        elif strides[axis] != 1:
            cuts.append((axis, 0, 2**31 - 1, strides[axis]))
    return sliced(b, x[0], cuts, shape)


def sliced(
    b: Builder, value: Value, cuts: Sequence[tuple[int, Any, Any, int]], shape: tuple[Size, ...]
) -> Value:
    """Slice (axis, start, end, step) of logical axes."""
    if not cuts:
        return value
    if any(not isinstance(number, int) for cut in cuts for number in cut):
        raise NotCovered("a slice along an axis whose size varies")
    value = b.plain(value)
    axes = b.ints([value.axis(axis) for axis, *_ in cuts])
    starts, ends, steps = (b.ints([cut[k] for cut in cuts]) for k in (1, 2, 3))
    name = b.node("Slice", [value.name, starts, ends, axes, steps])
    return dataclasses.replace(value, name=name, shape=shape)


def _rev(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    cuts = [(axis, -1, -(2**31), -1) for axis in node.params["dimensions"]]
    return sliced(b, x[0], cuts, shape)


def _pad(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    value, fill = b.plain(x[0]), x[1]
    config = [tuple(pads) for pads in node.params["padding_config"]]
    if any(interior for _, _, interior in config):
        raise NotCovered("padding between the elements")
    low = [max(config[axis][0], 0) for axis in value.order]
    high = [max(config[axis][1], 0) for axis in value.order]
    if any(low) or any(high):
        name = b.node("Pad", [value.name, b.ints([*low, *high]), fill.name], mode="constant")
        value = dataclasses.replace(value, name=name, shape=shape)
    cuts = [
        (axis, max(-before, 0), after if after < 0 else 2**31 - 1, 1)
        for axis, (before, after, _) in enumerate(config)
        if before < 0 or after < 0
    ]
    return sliced(b, value, cuts, shape)


def _concatenate(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    leader, axis = x[0], node.params["dimension"]
    names = []
    for value in x:
        sizes = list(shape)
        sizes[axis] = value.shape[axis]
        names.append(b.ordered(b.expanded(value, sizes), leader.order).name)
    name = b.node("Concat", names, axis=leader.axis(axis))
    return Value(name, shape, leader.order)


def _gather(b: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """Rows of a table: the first axis by an index, the other axes whole."""
    table, indices = (b.ordered(v, straight(v.rank)) for v in x)
    numbers, sizes = node.params["dimension_numbers"], list(node.params["slice_sizes"])
    offsets = list(range(len(shape) - table.rank + 1, len(shape)))
    fits = (
        isinstance(numbers, dict)
        and list(numbers["collapsed_slice_dims"]) == [0]
        and list(numbers["start_index_map"]) == [0]
        and list(numbers["offset_dims"]) == offsets
        and sizes == [1, *table.shape[1:]]
    )
    if not fits:
        raise NotCovered("a gather other than of rows")
    picked = b.reshaped(indices, indices.shape[:-1])
    name = b.node("Gather", [table.name, picked.name], axis=0)
    return Value(name, shape, straight(len(shape)))


TABLE: dict[str, Emit] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
# These take an operand whose broadcast is put off; the others get the copies.
LAZY = frozenset({"broadcast_in_dim", "squeeze", "transpose", "concatenate"})


def split(b: Builder, node: Node, value: Value, shapes: Sequence[tuple[Size, ...]]) -> list[Value]:
    """Several slices along one axis."""
    value = b.plain(value)
    axis = value.axis(node.params["axis"])
    sizes = b.ints(node.params["sizes"])
    names = b.split_node("Split", [value.name, sizes], len(shapes), axis=axis)
    return [
        dataclasses.replace(value, name=name, shape=shape)
        for name, shape in zip(names, shapes, strict=True)
    ]
