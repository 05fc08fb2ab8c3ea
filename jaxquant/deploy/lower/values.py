"""Values of a graph that is written, whose axes need not lie as the model's do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

Size = int | str  # a string names a size that varies


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor of the graph that is written.

    Attributes:
      name: in that graph.
      shape: the sizes of its logical axes, those of the JAX tensor; 1 where that one holds copies
        (a broadcast is put off, since most operations do it themselves).
      order: the logical axis that each physical axis holds.  A transpose changes this alone.
      factor: the JAX tensor is this times the written one; a window's sum is an average times a
        number, which the division behind it takes away again.
    """

    name: str
    shape: tuple[Size, ...]
    order: tuple[int, ...]
    factor: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def physical(self) -> tuple[Size, ...]:
        """The sizes of the physical axes."""
        return tuple(self.shape[axis] for axis in self.order)

    def axis(self, logical: int) -> int:
        """The physical axis of a logical one."""
        return self.order.index(logical)


def straight(rank: int) -> tuple[int, ...]:
    """The order of axes that lie as the model's do."""
    return tuple(range(rank))


def times(size: Size, factor: int) -> Size:
    """A multiple of a size, of one that varies as an expression."""
    return size * factor if isinstance(size, int) else f"{factor}*({size})"


def spread_shapes(shape: Sequence[Size], axis: int, between: int) -> list[tuple[Size, ...]]:
    """The shapes on the way to so many elements behind each along an axis.

    A new axis behind it, of size 1; the same, with the elements in it; both as one axis.
    """
    before, (size, *behind) = shape[:axis], shape[axis:]
    ways = (size, 1), (size, 1 + between), (times(size, 1 + between),)
    return [(*before, *way, *behind) for way in ways]


def kept_order(value: Value, shape: Sequence[Size]) -> tuple[int, ...] | None:
    """The order behind a reshape by which only axes of size 1 come and go; None of others."""
    before = [axis for axis, size in enumerate(value.shape) if size != 1]
    after = [axis for axis, size in enumerate(shape) if size != 1]
    if [value.shape[a] for a in before] != [shape[a] for a in after]:
        return None
    target = dict(zip(before, after, strict=True))
    moved = [target[axis] for axis in value.order if axis in target]
    # In order as they are, the axes of size 1 may stand where the model has them.
    if moved == sorted(moved):
        return straight(len(shape))
    return tuple(moved + [axis for axis, size in enumerate(shape) if size == 1])
