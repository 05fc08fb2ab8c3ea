"""Primitives that place values by index: scatter and the update of a slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import whole_numbers as whole
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.indexing import Emit, Shapes
from jaxquant.deploy.onnx.places import (
    Axis,
    Places,
    columns,
    find_places,
    partial_axes,
    whole_numbers,
)
from jaxquant.deploy.onnx.whole_numbers import Whole


def _dynamic_update_slice(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, update = x[0], x[1]
    axes = [axis for axis, size in enumerate(update.shape) if size != operand.shape[axis]]
    # An update of all of it leaves nothing of what was there.
    if not axes:
        return [update]
    partial = [Axis(axis, update.shape[axis], True) for axis in axes]
    starts = [
        (
            axis,
            update.shape[axis],
            whole.reshaped(builder, whole_numbers(builder, x[2 + axis]), [1]),
        )
        for axis in axes
    ]
    # JAX moves an update that would reach beyond the end.
    places = find_places(builder, partial, operand.shape, (), starts, "CLIP")
    return [_place(builder, operand, update, [axis.axis for axis in partial], places, "none")]


_SCATTERS = {
    "scatter": "none",
    "scatter-add": "add",
    "scatter-max": "max",
    "scatter-min": "min",
    "scatter-mul": "mul",
    "scatter-sub": "add",  # of what is negated
}
_SINCE = {"none": 11, "add": 16, "mul": 16, "max": 18, "min": 18}


def _scatter(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, indices, updates = x[0], x[1], builder.plain(x[2])
    reduction = _SCATTERS[node.op]
    if node.op == "scatter" and node.params.get("update_jaxpr") is not None:
        raise NotCovered("a scatter that applies a function")
    if builder.opset < _SINCE[reduction]:
        raise NotCovered(f"{node.op!r} before opset {_SINCE[reduction]}")
    numbers = node.params["dimension_numbers"]
    inserted, batching = (
        list(numbers["inserted_window_dims"]),
        list(numbers["operand_batching_dims"]),
    )
    placed = list(numbers["scatter_dims_to_operand_dims"])
    window_axes = sorted(numbers["update_window_dims"])
    batched = dict(zip(batching, numbers["scatter_indices_batching_dims"], strict=True))
    kept = [a for a in range(operand.rank) if a not in inserted and a not in batching]
    place = dict(zip(kept, window_axes, strict=True))
    # Axes that the updates do not have are windows of one element.
    sizes = [updates.shape[place[a]] if a in place else 1 for a in range(operand.rank)]
    partial = partial_axes(operand.shape, sizes, kept, placed, batched)
    batch = indices.shape[:-1]
    starts = [(a, sizes[a], c) for a, c in zip(placed, columns(builder, indices), strict=True)]
    places = find_places(builder, partial, operand.shape, batch, starts, str(node.params["mode"]))
    axes = [axis.axis for axis in partial]
    whole_axes = [a for a in range(operand.rank) if a not in axes]
    batch_axes = [a for a in range(updates.rank) if a not in window_axes]
    order = [*batch_axes, *(place[a] for a in axes if a in kept), *(place[a] for a in whole_axes)]
    # ONNX adds and has no subtraction here.
    if node.op == "scatter-sub":
        updates = dataclasses.replace(updates, name=builder.node("Neg", [updates.name]))
    # `_place` reads the physical order alone, which is that of the operand's axes then.
    moved = builder.ordered(updates, order)
    straightened = Value(moved.name, moved.physical, straight(moved.rank))
    return [_place(builder, operand, straightened, axes, places, reduction, len(batch))]


def _place(
    builder: Builder,
    operand: Value,
    updates: Value,
    axes: Sequence[int],
    places: Places,
    reduction: str,
    batch: int | None = None,
) -> Value:
    """The operand with updates at their places; those of a window that is not inside are dropped.

    Args:
      builder: of the graph.
      operand: what is written to.
      updates: in the operand's axes; with `batch`, in the order (batch, windows along the partial
        axes, whole axes).
      axes: the partial axes.
      places: of the windows.
      reduction: what becomes of what was there, by ONNX's name.
      batch: how many axes the batch of indices has.
    """

    # ScatterND takes coordinates along the first axes, and whole slices of the rest.
    order = (*axes, *(a for a in range(operand.rank) if a not in axes))
    data = builder.ordered(operand, order)
    name, coordinates = data.name, places.coordinates
    if batch is None:
        updates = builder.ordered(updates, order)
    if places.inside is not None:
        # Windows that are not inside go to a further place along the first axis, which is cut off.
        pads = [0] * (2 * data.rank)
        pads[data.rank] = 1
        name = builder.node("Pad", [name, builder.ints(pads)], mode="constant")
        coordinates = _beyond(builder, places, data.shape[axes[0]], len(axes), batch or 0)
    attributes: dict[str, Any] = {} if reduction == "none" else {"reduction": reduction}
    name = builder.node(
        "ScatterND", [name, whole.name_of(builder, coordinates), updates.name], **attributes
    )
    # What was dropped went to the place behind the end, which goes now.
    if places.inside is not None:
        limit = whole.name_of(builder, whole.of_size(builder, data.shape[axes[0]]))
        name = builder.node("Slice", [name, builder.ints([0]), limit, builder.ints([0])])
    return Value(name, operand.shape, order)


def _beyond(builder: Builder, places: Places, size: Size, count: int, batch: int) -> Whole:
    """The coordinates, of windows that are not inside (size, 0, 0, ...)."""
    assert places.inside is not None
    inside = places.inside if isinstance(places.inside, str) else builder.constant(places.inside)
    ones = [1] * (len(places.sizes) - batch + 1)
    mask = builder.node("Reshape", [inside, builder.shape([*places.sizes[:batch], *ones])])
    away = whole.name_of(builder, whole.of_size(builder, size))
    if count > 1:
        # Zeros behind the first: a place that exists along the other axes.
        away = builder.node("Concat", [away, builder.ints([0] * (count - 1))], axis=0)
    return builder.node("Where", [mask, whole.name_of(builder, places.coordinates), away])


TABLE: dict[str, Emit] = {
    "dynamic_update_slice": _dynamic_update_slice,
    **dict.fromkeys(_SCATTERS, _scatter),
}
