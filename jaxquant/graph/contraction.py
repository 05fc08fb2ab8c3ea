"""Contractions: convolution and dot as one concept, by what becomes of their operands' axes.

A contraction multiplies two operands and sums.  Of an axis of an operand it makes one of these:

    batch       both operands and the result have it; its indices do not meet
    free        one operand and the result have it
    contracted  both operands have it, and it is summed over
    window      of the first operand, along which the second slides (and is summed over); the result
                has one position for each place of the second
    chosen      of the second operand: each row of the first meets one of its indices, as a third
                operand tells (the experts of a ragged dot)

A dot has no window; a convolution has no batch axes: its samples are free axes of the input, its
output channels those of the kernel, its input channels are contracted.  Where channels fall into
groups, a kernel has the input channels of one group alone.

This is the one place that reads the parameters of the primitives.  Everything else asks the
contraction, so that a further primitive is one more entry of the table at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

DotNumbers = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of an operand by their part.

    The k-th axis of a part belongs to the k-th one of the other operand's part, and of the
    result's; free axes alone belong to an operand.
    """

    batch: tuple[int, ...] = ()
    free: tuple[int, ...] = ()
    contracted: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    chosen: tuple[int, ...] = ()

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes of a weight that are not summed over, ascending: those of output channels."""
        return tuple(sorted((*self.batch, *self.free, *self.chosen)))

    @property
    def rank(self) -> int:
        return len((*self.kept, *self.contracted, *self.window))


@dataclasses.dataclass(frozen=True)
class Result:
    """The axes of the result; `free` holds those of the first and of the second operand."""

    batch: tuple[int, ...]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    window: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Window:
    """How a kernel slides over its input, one entry for each window axis, in their order.

    Attributes:
      strides: between two positions.
      padding: zeros before and after the input; negative where it is cropped.
      dilation: the distance between two neighbours in the kernel.
      input_dilation: likewise in the input, with zeros between them: more than 1 in a transposed
        convolution.
      feature_groups: into how many groups the channels fall.
      batch_groups: into how many the samples do, each with output channels of its own.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    input_dilation: tuple[int, ...]
    feature_groups: int = 1
    batch_groups: int = 1

    @property
    def is_undilated(self) -> bool:
        """True where nothing lies between the elements of the input, and no padding is negative."""
        return all(d == 1 for d in self.input_dilation) and all(
            pad >= 0 for pads in self.padding for pad in pads
        )

    def without_first(self) -> Window:
        """The window of the axes behind the first one."""
        return dataclasses.replace(
            self,
            strides=self.strides[1:],
            padding=self.padding[1:],
            dilation=self.dilation[1:],
            input_dilation=self.input_dilation[1:],
        )


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of two operands that is summed over some of their axes.

    Attributes:
      operands: the axes of the first and of the second operand; of a convolution the second one is
        the kernel.
      result: the axes of the result.
      window: how the second operand slides over the first; None of a dot.
      choosing: the free axis of the first operand whose rows are in groups, one group after the
        other, each of which meets one index of what is chosen; None where nothing is.
    """

    operands: tuple[Axes, Axes]
    result: Result
    window: Window | None = None
    choosing: int | None = None

    @property
    def axes(self) -> tuple[Axes, Axes, Result]:
        """What the axes are, whatever the window and the sizes."""
        return (*self.operands, self.result)

    @property
    def feature_groups(self) -> int:
        """Into how many groups the contracted axis falls; the second operand has one of them."""
        return 1 if self.window is None else self.window.feature_groups

    @property
    def has_batch(self) -> bool:
        """True where both operands have an axis that is not summed over."""
        return bool(self.operands[0].batch)

    @property
    def is_dot(self) -> bool:
        """True for what `lax.dot_general` does: every part but a window."""
        return self.window is None and not self.operands[1].chosen

    @property
    def takes_weight_first(self) -> bool:
        """True where the first operand may be the weight as well as the second."""
        return self.is_dot

    @property
    def dot_numbers(self) -> DotNumbers:
        """The dimension numbers of `lax.dot_general`."""
        assert self.is_dot, "only a dot has dimension numbers"
        first, second = self.operands
        return (first.contracted, second.contracted), (first.batch, second.batch)

    @property
    def swapped(self) -> Contraction:
        """The same dot of the operands in the other order; its result has the free axes so too."""
        assert self.is_dot, "of a dot alone either operand may be the first"
        return _of_dot(reversed(self.operands))

    def place(self, side: int, axis: int) -> int | None:
        """Where a batch or free axis of an operand is in the result; None of another axis."""
        own = self.operands[side]
        if axis in own.batch:
            return self.result.batch[own.batch.index(axis)]
        if axis in own.free:
            return self.result.free[side][own.free.index(axis)]
        return None

    def spread_shape(self, side: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """The shape in which an array [*batch, *free] of an operand of a dot meets the result.

        A ragged dot has one too, without the chosen axes, which are not in the result.

        Example:
          >>> dot((((1,), (0,)), ((), ())), (2, 2)).spread_shape(1, (5,))
          (1, 5)
        """
        assert self.window is None, "a convolution has its axes in any order"
        shape = [1] * (len(self.result.batch) + sum(map(len, self.result.free)))
        places = (*self.result.batch, *self.result.free[side])
        for place, size in zip(places, sizes, strict=True):
            shape[place] = size
        return tuple(shape)

    def varying(self, operands: Sequence[frozenset[int]]) -> frozenset[int]:
        """The axes along which the result may vary, given those of the operands."""
        if self.window is None:
            places = {self.place(side, axis) for side in (0, 1) for axis in operands[side]}
            if set(self.operands[1].chosen) & operands[1]:
                # What a row chose decides on all of its result.
                places |= set(self.result.free[0])  # rows differ by what they chose
            return frozenset(place for place in places if place is not None)
        # Padding tells positions apart, groups the channels; samples only the input does.
        samples = set(self.operands[0].free) & operands[0] or self.window.batch_groups != 1
        rest = (*self.result.window, *self.result.free[1])
        return frozenset((*self.result.free[0], *rest) if samples else rest)

    def terms(self, second: Sequence[int]) -> int:
        """How many products each element of the result sums, given the second operand's shape."""
        own = self.operands[1]
        return math.prod(second[axis] for axis in (*own.contracted, *own.window))


def build(name: str, params: Mapping[str, Any], ranks: Sequence[int]) -> Contraction | None:
    """The contraction that a primitive is; None of any other primitive.

    Args:
      name: of the primitive.
      params: of the equation.
      ranks: the numbers of axes of its operands.
    """
    builder = _BUILDERS.get(name)
    return None if builder is None else builder(params, ranks)


def dot(numbers: DotNumbers, ranks: Sequence[int]) -> Contraction:
    """The contraction of `lax.dot_general` with these dimension numbers.

    The result has the batch axes, then the free axes of the first operand, then of the second.

    Example:
      >>> found = dot((((2,), (0,)), ((), ())), (3, 2))
      >>> found.operands[0].free, found.result.free
      ((0, 1), ((0, 1), (2,)))
    """
    contracted, batch = numbers
    return _of_dot(
        Axes(
            batch=_whole(batch[side]),
            # In ascending order, as the result has them.
            free=tuple(a for a in range(rank) if a not in (*contracted[side], *batch[side])),
            contracted=_whole(contracted[side]),
        )
        for side, rank in enumerate(ranks[:2])
    )


def _of_dot(operands: Iterable[Axes]) -> Contraction:
    """The batch axes come first in the result, then the free ones of the first operand."""
    first, second = operands
    shared = len(first.batch)
    middle = shared + len(first.free)
    end = middle + len(second.free)
    free = tuple(range(shared, middle)), tuple(range(middle, end))
    return Contraction((first, second), Result(tuple(range(shared)), free))


def _dot(params: Mapping[str, Any], ranks: Sequence[int]) -> Contraction:
    return dot(params["dimension_numbers"], ranks)


def summed_over_leading(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The parameters of a dot of operands with so many more leading axes, which it sums over."""
    contracted, batch = (
        tuple(tuple(axis + count for axis in axes) for axes in pair)
        for pair in params["dimension_numbers"]
    )
    # What is summed over in front meets along the same places of both.
    summed = tuple((*range(count), *axes) for axes in contracted)
    return {**params, "dimension_numbers": (summed, batch)}


def _ragged(params: Mapping[str, Any], ranks: Sequence[int]) -> Contraction | None:
    """A dot whose rows are in groups, one after the other, each with a weight of its own.

    None where the groups are of what is summed over, or of batches: no weight is chosen there.
    """
    numbers = params["ragged_dot_dimension_numbers"]
    rows, chosen = numbers.lhs_ragged_dimensions, _whole(numbers.rhs_group_dimensions)
    first, second = dot(numbers.dot_dimension_numbers, ranks).operands
    # Groups of sums or of batches have no weight that a row chooses.
    if not chosen or not set(rows) <= set(first.free):
        return None
    free = tuple(axis for axis in second.free if axis not in chosen)
    found = _of_dot((first, dataclasses.replace(second, free=free, chosen=chosen)))
    return dataclasses.replace(found, choosing=int(rows[0]))


def _conv(params: Mapping[str, Any], ranks: Sequence[int]) -> Contraction:
    # JAX's specs list, for each operand, batch (or output) axis, feature axis, spatial axes.
    # XLA names axes by lists: samples and channels first, whatever their order in memory.
    spec = params["dimension_numbers"]
    samples, channels, *positions = spec.lhs_spec
    outputs, inputs, *taps = spec.rhs_spec
    out_samples, out_channels, *out_positions = spec.out_spec
    feature_groups, batch_groups = _whole(
        [params["feature_group_count"], params["batch_group_count"]]
    )
    return Contraction(
        operands=(
            Axes((), _whole([samples]), _whole([channels]), _whole(positions)),
            Axes((), _whole([outputs]), _whole([inputs]), _whole(taps)),
        ),
        result=Result((), (_whole([out_samples]), _whole([out_channels])), _whole(out_positions)),
        window=Window(
            strides=_whole(params["window_strides"]),
            padding=tuple((low, high) for low, high in map(_whole, params["padding"])),
            dilation=_whole(params["rhs_dilation"]),
            input_dilation=_whole(params["lhs_dilation"]),
            feature_groups=feature_groups,
            batch_groups=batch_groups,
        ),
    )


def _whole(numbers: Iterable[Any]) -> tuple[Any, ...]:
    """Python's integers, whatever integers a model was written with; sizes with names stay."""
    return tuple(int(n) if isinstance(n, Integral) else n for n in numbers)


DOT = "dot_general"  # the primitive of a dot without groups
_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], Sequence[int]], Contraction | None]] = {
    "conv_general_dilated": _conv,
    DOT: _dot,
    "ragged_dot_general": _ragged,
}
PRIMITIVES = frozenset(_BUILDERS)
"""The primitives that are contractions, by name."""
DENSE = frozenset({"conv_general_dilated", DOT})
"""The primitives that are a convolution or a dot whatever their parameters."""
