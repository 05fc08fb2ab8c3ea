"""Primitives that pick and place by index: gather, scatter and their dynamic slices.

All come to the same few axes: an operand's axes are *partial*, of which a window is taken whose
place an index gives, or *whole*.  With the partial ones first, GatherND and ScatterND take the
places of the windows' elements as coordinates along them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.onnx import whole_numbers as whole
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.elementwise import ONNX_TYPES
from jaxquant.deploy.onnx.whole_numbers import Whole

Truth = np.ndarray | str


@dataclasses.dataclass(frozen=True)
class Axis:
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
class Places:
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


def partial_axes(
    shape: Sequence[Size],
    sizes: Sequence[Size],
    kept: Sequence[int],
    placed: Sequence[int],
    batched: Mapping[int, int],
) -> list[Axis]:
    """The partial axes of an operand that is read or written by index.

    Args:
      shape: of the operand.
      sizes: of a window along each of its axes.
      kept: the axes that a window has.
      placed: the axes whose place an index gives.
      batched: axis of the operand -> that of the indices that runs along it.
    """
    partial = [
        Axis(axis, sizes[axis] if axis in kept else None, axis in placed, batched.get(axis))
        for axis in range(len(shape))
        if axis not in kept or sizes[axis] != shape[axis]
    ]
    # A window as large as the operand, for each index.
    return partial or [Axis(kept[0], sizes[kept[0]])]


def find_places(
    builder: Builder,
    partial: Sequence[Axis],
    shape: Sequence[Size],
    batch: Sequence[Size],
    starts: Sequence[tuple[int, Size, Whole]],
    mode: str,
) -> Places:
    """The places of all elements of all windows.

    Args:
      builder: of the graph.
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
    # JAX moves a window that reaches beyond the end, or drops it, by its mode.
    for number, window, start in starts:
        last = whole.subtract(
            builder, whole.of_size(builder, shape[number]), whole.of_size(builder, window)
        )
        # A dropped window is still read or written somewhere: what is clipped is masked afterwards.
        if mode == "FILL_OR_DROP":
            here = whole.within(builder, start, last)
            inside = here if inside is None else whole.both(builder, inside, here)
        # Its caller promises that indices are inside.
        if number in read:
            moved[number] = start if "PROMISE" in mode else whole.clipped(builder, start, last)
    # The coordinate along each partial axis: where the window starts, and how far in it one is.
    parts: list[Whole] = []
    for axis in partial:
        part: Whole = np.zeros((1,) * len(sizes), np.int64)
        if axis.batch is not None:
            part = _counted_along(builder, axis.batch, batch[axis.batch], len(sizes))
        elif axis.is_placed:
            part = whole.reshaped(builder, moved[axis.axis], (*batch, *[1] * len(windows)))
        if axis.window is not None and axis.window != 1:
            position = len(batch) + windows.index(axis)
            part = whole.add(
                builder, part, _counted_along(builder, position, axis.window, len(sizes))
            )
        parts.append(part)

    # Known to be inside, all of them: no mask is needed.
    if isinstance(inside, np.ndarray) and inside.all():
        inside = None
    return Places(whole.stacked(builder, parts, sizes), sizes, inside)


def _counted_along(builder: Builder, axis: int, size: Size, rank: int) -> Whole:
    """0, 1, 2, ... along one of so many axes, the others of size 1."""
    sizes = [*[1] * axis, size, *[1] * (rank - axis - 1)]
    return whole.reshaped(builder, whole.counted(builder, size), sizes)


def columns(builder: Builder, indices: Value) -> list[Whole]:
    """The columns of indices [*batch, K]: [*batch] each."""
    number, count = whole_numbers(builder, indices), indices.shape[-1]
    if not isinstance(count, int):
        raise NotCovered("indices along a number of axes that varies")
    # Indices that are known become constants, and need no node.
    if isinstance(number, np.ndarray):
        return [number[..., k] for k in range(count)]
    axis = indices.rank - 1
    return [
        builder.node("Gather", [number, builder.constant(np.int64(k), "column")], axis=axis)
        for k in range(count)
    ]


def whole_numbers(builder: Builder, value: Value) -> Whole:
    """A value of whole numbers, its logical axes in order."""
    value = builder.ordered(value, straight(value.rank))
    if value.name in builder.arrays:
        return builder.arrays[value.name].astype(np.int64)
    return builder.node("Cast", [value.name], to=ONNX_TYPES["int64"])
