"""Primitives that pick by index: gather and the slice at a place that varies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import whole_numbers as whole
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.places import Truth, columns, find_places, partial_axes, whole_numbers
from jaxquant.deploy.onnx.whole_numbers import Whole

Shapes = Sequence[tuple[Size, ...]]
Emit = Callable[[Builder, Node, list[Value], Shapes, Sequence[str]], list[Value]]


def _gather(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, indices = builder.plain(x[0]), x[1]
    numbers, sizes = node.params["dimension_numbers"], list(node.params["slice_sizes"])
    collapsed, batching = (
        list(numbers["collapsed_slice_dims"]),
        list(numbers["operand_batching_dims"]),
    )
    placed, offsets = list(numbers["start_index_map"]), sorted(numbers["offset_dims"])
    batched = dict(zip(batching, numbers["start_indices_batching_dims"], strict=True))
    kept = [a for a in range(operand.rank) if a not in collapsed and a not in batching]
    partial = partial_axes(operand.shape, sizes, kept, placed, batched)
    batch = indices.shape[:-1]
    starts = [(a, sizes[a], c) for a, c in zip(placed, columns(builder, indices), strict=True)]
    mode = str(node.params["mode"])
    places = find_places(builder, partial, operand.shape, batch, starts, mode)

    # Places come first where there are several; the other axes stay in their order in memory.
    axes = [axis.axis for axis in partial]
    windows = [a for a in axes if a in kept]
    rest = [a for a in operand.order if a not in axes]
    # Gather is what runtimes optimize; GatherND is for places along several axes.
    if len(axes) == 1:
        number = whole.reshaped(builder, places.coordinates, places.sizes)
        at = operand.axis(axes[0])
        name = builder.node("Gather", [operand.name, whole.name_of(builder, number)], axis=at)
        before, behind = operand.order[:at], operand.order[at + 1 :]
    else:
        data = builder.ordered(operand, (*axes, *rest))
        name = builder.node("GatherND", [data.name, whole.name_of(builder, places.coordinates)])
        before, behind = (), tuple(rest)
    # Which axis of JAX's result each axis of the operator's result is.
    place = dict(zip(kept, offsets, strict=True))
    batch_axes = [a for a in range(len(shapes[0])) if a not in offsets]
    picked = [*batch_axes, *(place[a] for a in windows)]
    order = (*(place[a] for a in before), *picked, *(place[a] for a in behind))
    result = Value(name, shapes[0], order)
    if places.inside is not None:
        result = _filled(builder, node, result, batch_axes, places.inside, batch, dtypes[0])
    return [result]


def _filled(
    builder: Builder,
    node: Node,
    value: Value,
    batch_axes: Sequence[int],
    inside: Truth,
    batch: Sequence[Size],
    dtype: str,
) -> Value:
    """The value where the indices are inside, elsewhere what JAX fills with."""
    sizes: list[Size] = [1] * value.rank
    for axis, size in zip(batch_axes, batch, strict=True):
        sizes[axis] = size
    # The batch axes of the result are in the order of the indices, in any physical order.
    mask = inside if isinstance(inside, str) else builder.constant(inside)
    mask = builder.node("Reshape", [mask, builder.shape([sizes[axis] for axis in value.order])])
    if dtype == "bool":  # filled with true, which is `or not inside`; Where does not take it
        return dataclasses.replace(
            value, name=builder.node("Or", [value.name, builder.node("Not", [mask])])
        )
    given = node.params.get("fill_value")
    fill = _default_fill(dtype) if given is None else np.asarray(float(given)).astype(dtype)
    name = builder.node("Where", [mask, value.name, builder.constant(fill, "fill")])
    return dataclasses.replace(value, name=name)


def _default_fill(dtype: str) -> np.ndarray:
    if dtype.startswith("float"):
        return np.asarray(np.nan, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(limits.max if dtype.startswith("uint") else limits.min, dtype)


def _dynamic_slice(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    value, sizes = builder.plain(x[0]), list(node.params["slice_sizes"])
    axes = [axis for axis, size in enumerate(sizes) if size != value.shape[axis]]
    if not axes:
        return [value]
    starts, ends = [], []
    for axis in axes:
        window = whole.of_size(builder, sizes[axis])
        last = whole.subtract(builder, whole.of_size(builder, value.shape[axis]), window)
        # JAX moves a slice that would reach beyond the end; ONNX would cut it.
        start = whole.clipped(
            builder, whole.reshaped(builder, whole_numbers(builder, x[1 + axis]), [1]), last
        )
        starts.append(start)
        ends.append(whole.add(builder, start, window))

    # All axes in one operator, by their order in memory.
    along = builder.ints([value.axis(axis) for axis in axes])
    name = builder.node(
        "Slice", [value.name, _joined(builder, starts), _joined(builder, ends), along]
    )
    return [dataclasses.replace(value, name=name, shape=shapes[0])]


def _joined(builder: Builder, numbers: Sequence[Whole]) -> str:
    """Numbers [1] as one tensor."""
    names = [whole.name_of(builder, number) for number in numbers]
    return names[0] if len(names) == 1 else builder.node("Concat", names, axis=0)


TABLE: dict[str, Emit] = {
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
}
