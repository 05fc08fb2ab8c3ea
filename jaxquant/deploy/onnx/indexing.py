"""Primitives that pick and place by index: gather, scatter and their dynamic slices.

All come to the same few axes: an operand's axes are *partial*, of which a window is taken whose
place an index gives, or *whole*.  With the partial ones first, GatherND and ScatterND take the
places of the windows' elements as coordinates along them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import whole_numbers as whole
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.elementwise import ONNX_TYPES
from jaxquant.deploy.onnx.whole_numbers import Whole

Shapes = Sequence[tuple[Size, ...]]
Emit = Callable[[Builder, Node, list[Value], Shapes, Sequence[str]], list[Value]]
Truth = np.ndarray | str


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A partial axis of an operand.

    Attributes:
      axis: of the operand.
      window: how many elements are taken; None for an axis that the result does not have.
      is_placed: whether an index says where; else the window is at the start.
      batch: the axis of the indices that runs along this axis, where both are batched.
    """

    axis: int
    window: Size | None
    is_placed: bool = False
    batch: int | None = None


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where windows are.

    Attributes:
      coordinates: int64 [*sizes, partial axes].
      sizes: of the batch of indices, and of the windows along the partial axes.
      inside: for each of the batch of indices, whether all of its window is in the operand; None
        where it always is.
    """

    coordinates: Whole
    sizes: tuple[Size, ...]
    inside: Truth | None


def _places(
    b: Builder,
    partial: Sequence[_Axis],
    shape: Sequence[Size],
    batch: Sequence[Size],
    starts: Sequence[tuple[int, Size, Whole]],
    mode: str,
) -> _Places:
    """The places of all elements of all windows.

    Args:
      b: the graph.
      partial: the partial axes, in order.
      shape: of the operand.
      batch: the sizes of the batch of indices.
      starts: (axis of the operand, window size, its starts: [*batch]), for each column.
      mode: what happens to windows that are not inside, by JAX's name.
    """
    windows = [axis for axis in partial if axis.window is not None]
    sizes = (*batch, *(axis.window for axis in windows if axis.window is not None))
    inside: Truth | None = None
    read = {axis.axis for axis in partial if axis.is_placed}
    moved: dict[int, Whole] = {}
    for number, window, start in starts:
        last = whole.subtract(b, whole.of_size(b, shape[number]), whole.of_size(b, window))
        if mode == "FILL_OR_DROP":
            here = whole.within(b, start, last)
            inside = here if inside is None else whole.both(b, inside, here)
        if number in read:
            moved[number] = start if "PROMISE" in mode else whole.clipped(b, start, last)
    parts: list[Whole] = []
    for axis in partial:
        part: Whole = np.zeros((1,) * len(sizes), np.int64)
        if axis.batch is not None:
            part = _counted_along(b, axis.batch, batch[axis.batch], len(sizes))
        elif axis.is_placed:
            part = whole.reshaped(b, moved[axis.axis], (*batch, *[1] * len(windows)))
        if axis.window is not None and axis.window != 1:
            position = len(batch) + windows.index(axis)
            part = whole.add(b, part, _counted_along(b, position, axis.window, len(sizes)))
        parts.append(part)
    if isinstance(inside, np.ndarray) and inside.all():
        inside = None
    return _Places(whole.stacked(b, parts, sizes), sizes, inside)


def _counted_along(b: Builder, axis: int, size: Size, rank: int) -> Whole:
    """0, 1, 2, ... along one of so many axes, the others of size 1."""
    sizes = [*[1] * axis, size, *[1] * (rank - axis - 1)]
    return whole.reshaped(b, whole.counted(b, size), sizes)


def _columns(b: Builder, indices: Value) -> list[Whole]:
    """The columns of indices [*batch, K]: [*batch] each."""
    number, count = _whole(b, indices), indices.shape[-1]
    if not isinstance(count, int):
        raise NotCovered("indices along a number of axes that varies")
    if isinstance(number, np.ndarray):
        return [number[..., k] for k in range(count)]
    axis = indices.rank - 1
    return [
        b.node("Gather", [number, b.constant(np.int64(k), "column")], axis=axis)
        for k in range(count)
    ]


def _whole(b: Builder, value: Value) -> Whole:
    """A value of whole numbers, its logical axes in order."""
    value = b.ordered(value, straight(value.rank))
    if value.name in b.arrays:
        return b.arrays[value.name].astype(np.int64)
    return b.node("Cast", [value.name], to=ONNX_TYPES["int64"])


def _gather(
    b: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, indices = b.plain(x[0]), x[1]
    numbers, sizes = node.params["dimension_numbers"], list(node.params["slice_sizes"])
    collapsed, batching = (
        list(numbers["collapsed_slice_dims"]),
        list(numbers["operand_batching_dims"]),
    )
    map_, offsets = list(numbers["start_index_map"]), sorted(numbers["offset_dims"])
    batched = dict(zip(batching, numbers["start_indices_batching_dims"], strict=True))
    kept = [a for a in range(operand.rank) if a not in collapsed and a not in batching]
    partial = [
        _Axis(a, sizes[a] if a in kept else None, a in map_,
              batched.get(a))
        for a in range(operand.rank) if a not in kept or sizes[a] != operand.shape[a]
    ]  # fmt: skip
    if not partial:  # a window as large as the operand, for each index
        partial = [_Axis(kept[0], sizes[kept[0]])]
    batch = indices.shape[:-1]
    starts = [(a, sizes[a], c) for a, c in zip(map_, _columns(b, indices), strict=True)]
    mode = str(node.params["mode"])
    places = _places(b, partial, operand.shape, batch, starts, mode)
    axes = [axis.axis for axis in partial]
    windows = [a for a in axes if a in kept]
    rest = [a for a in operand.order if a not in axes]
    if len(axes) == 1:
        number = whole.reshaped(b, places.coordinates, places.sizes)
        at = operand.axis(axes[0])
        name = b.node("Gather", [operand.name, whole.name_of(b, number)], axis=at)
        before, behind = operand.order[:at], operand.order[at + 1 :]
    else:
        data = b.ordered(operand, (*axes, *rest))
        name = b.node("GatherND", [data.name, whole.name_of(b, places.coordinates)])
        before, behind = (), tuple(rest)
    place = dict(zip(kept, offsets, strict=True))
    batch_axes = [a for a in range(len(shapes[0])) if a not in offsets]
    picked = [*batch_axes, *(place[a] for a in windows)]
    order = (*(place[a] for a in before), *picked, *(place[a] for a in behind))
    result = Value(name, shapes[0], order)
    if places.inside is not None:
        result = _filled(b, node, result, batch_axes, places.inside, batch, dtypes[0])
    return [result]


def _filled(
    b: Builder,
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
    mask = inside if isinstance(inside, str) else b.constant(inside)
    mask = b.node("Reshape", [mask, b.shape([sizes[axis] for axis in value.order])])
    if dtype == "bool":  # filled with true, which is `or not inside`; Where does not take it
        return dataclasses.replace(value, name=b.node("Or", [value.name, b.node("Not", [mask])]))
    given = node.params.get("fill_value")
    fill = _default_fill(dtype) if given is None else np.asarray(float(given)).astype(dtype)
    name = b.node("Where", [mask, value.name, b.constant(fill, "fill")])
    return dataclasses.replace(value, name=name)


def _default_fill(dtype: str) -> np.ndarray:
    if dtype.startswith("float"):
        return np.asarray(np.nan, dtype)
    limits = np.iinfo(dtype)
    return np.asarray(limits.max if dtype.startswith("uint") else limits.min, dtype)


def _dynamic_slice(
    b: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    value, sizes = b.plain(x[0]), list(node.params["slice_sizes"])
    axes = [axis for axis, size in enumerate(sizes) if size != value.shape[axis]]
    if not axes:
        return [value]
    starts, ends = [], []
    for axis in axes:
        window = whole.of_size(b, sizes[axis])
        last = whole.subtract(b, whole.of_size(b, value.shape[axis]), window)
        start = whole.clipped(b, whole.reshaped(b, _whole(b, x[1 + axis]), [1]), last)
        starts.append(start)
        ends.append(whole.add(b, start, window))
    along = b.ints([value.axis(axis) for axis in axes])
    name = b.node("Slice", [value.name, _joined(b, starts), _joined(b, ends), along])
    return [dataclasses.replace(value, name=name, shape=shapes[0])]


def _joined(b: Builder, numbers: Sequence[Whole]) -> str:
    """Numbers [1] as one tensor."""
    names = [whole.name_of(b, number) for number in numbers]
    return names[0] if len(names) == 1 else b.node("Concat", names, axis=0)


def _dynamic_update_slice(
    b: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, update = x[0], x[1]
    axes = [axis for axis, size in enumerate(update.shape) if size != operand.shape[axis]]
    if not axes:
        return [update]
    partial = [_Axis(axis, update.shape[axis], True) for axis in axes]
    starts = [
        (axis, update.shape[axis], whole.reshaped(b, _whole(b, x[2 + axis]), [1])) for axis in axes
    ]
    places = _places(b, partial, operand.shape, (), starts, "CLIP")
    return [_place(b, operand, update, [axis.axis for axis in partial], places, "none")]


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
    b: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    operand, indices, updates = x[0], x[1], b.plain(x[2])
    reduction = _SCATTERS[node.op]
    if node.op == "scatter" and node.params.get("update_jaxpr") is not None:
        raise NotCovered("a scatter that applies a function")
    if b.opset < _SINCE[reduction]:
        raise NotCovered(f"{node.op!r} before opset {_SINCE[reduction]}")
    numbers = node.params["dimension_numbers"]
    inserted, batching = (
        list(numbers["inserted_window_dims"]),
        list(numbers["operand_batching_dims"]),
    )
    map_ = list(numbers["scatter_dims_to_operand_dims"])
    window_axes = sorted(numbers["update_window_dims"])
    batched = dict(zip(batching, numbers["scatter_indices_batching_dims"], strict=True))
    kept = [a for a in range(operand.rank) if a not in inserted and a not in batching]
    place = dict(zip(kept, window_axes, strict=True))
    sizes = [updates.shape[place[a]] if a in place else 1 for a in range(operand.rank)]
    partial = [
        _Axis(a, sizes[a] if a in kept else None, a in map_,
              batched.get(a))
        for a in range(operand.rank) if a not in kept or sizes[a] != operand.shape[a]
    ]  # fmt: skip
    if not partial:
        partial = [_Axis(kept[0], sizes[kept[0]])]
    batch = indices.shape[:-1]
    starts = [(a, sizes[a], c) for a, c in zip(map_, _columns(b, indices), strict=True)]
    places = _places(b, partial, operand.shape, batch, starts, str(node.params["mode"]))
    axes = [axis.axis for axis in partial]
    whole_axes = [a for a in range(operand.rank) if a not in axes]
    batch_axes = [a for a in range(updates.rank) if a not in window_axes]
    order = [*batch_axes, *(place[a] for a in axes if a in kept), *(place[a] for a in whole_axes)]
    if node.op == "scatter-sub":
        updates = dataclasses.replace(updates, name=b.node("Neg", [updates.name]))
    # `_place` reads the physical order alone, which is that of the operand's axes then.
    moved = b.ordered(updates, order)
    straightened = Value(moved.name, moved.physical, straight(moved.rank))
    return [_place(b, operand, straightened, axes, places, reduction, len(batch))]


def _place(
    b: Builder,
    operand: Value,
    updates: Value,
    axes: Sequence[int],
    places: _Places,
    reduction: str,
    batch: int | None = None,
) -> Value:
    """The operand with updates at their places; those of a window that is not inside are dropped.

    Args:
      b: the graph.
      operand: what is written to.
      updates: in the operand's axes; with `batch`, in the order (batch, windows along the partial
        axes, whole axes).
      axes: the partial axes.
      places: of the windows.
      reduction: what becomes of what was there, by ONNX's name.
      batch: how many axes the batch of indices has.
    """
    order = (*axes, *(a for a in range(operand.rank) if a not in axes))
    data = b.ordered(operand, order)
    name, coordinates = data.name, places.coordinates
    if batch is None:
        updates = b.ordered(updates, order)
    if places.inside is not None:
        # Windows that are not inside go to a further place along the first axis, which is cut off.
        pads = [0] * (2 * data.rank)
        pads[data.rank] = 1
        name = b.node("Pad", [name, b.ints(pads)], mode="constant")
        coordinates = _beyond(b, places, data.shape[axes[0]], len(axes), batch or 0)
    attributes: dict[str, Any] = {} if reduction == "none" else {"reduction": reduction}
    name = b.node("ScatterND", [name, whole.name_of(b, coordinates), updates.name], **attributes)
    if places.inside is not None:
        limit = whole.name_of(b, whole.of_size(b, data.shape[axes[0]]))
        name = b.node("Slice", [name, b.ints([0]), limit, b.ints([0])])
    return Value(name, operand.shape, order)


def _beyond(b: Builder, places: _Places, size: Size, count: int, batch: int) -> Whole:
    """The coordinates, of windows that are not inside (size, 0, 0, ...)."""
    assert places.inside is not None
    inside = places.inside if isinstance(places.inside, str) else b.constant(places.inside)
    ones = [1] * (len(places.sizes) - batch + 1)
    mask = b.node("Reshape", [inside, b.shape([*places.sizes[:batch], *ones])])
    away = whole.name_of(b, whole.of_size(b, size))
    if count > 1:
        away = b.node("Concat", [away, b.ints([0] * (count - 1))], axis=0)
    return b.node("Where", [mask, whole.name_of(b, places.coordinates), away])


TABLE: dict[str, Emit] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    **dict.fromkeys(_SCATTERS, _scatter),
}
