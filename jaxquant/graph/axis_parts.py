"""The axes of a tensor by what runs along them: the samples or the positions of a mask, or neither.

A mask [B, T] tells which positions are no padding.  An axis may be made of several parts, the
slowest first: one of B·T rows has a part of samples and one of positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

BATCH = -1  # the mark of samples; the positions of mask n have the mark n


class Part(NamedTuple):
    """A part of an axis.

    Attributes:
      size: its length.
      mark: what runs along it; None for neither samples nor positions.
      filled: the model has written values of its own choice where these positions are padding, as
        -1e9 for scores of an attention, so that these are read.
      met: the marks of positions that met along it, so that it has none of them.
    """

    size: int
    mark: int | None = None
    filled: bool = False
    met: frozenset[int] = frozenset()

    @property
    def is_position(self) -> bool:
        return self.mark is not None and self.mark != BATCH


Axis: TypeAlias = tuple[Part, ...]


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a tensor.

    Attributes:
      axes: its own.
      is_plain: it is computed from masks, ids and constants alone, by arithmetic: it holds no
        activation.
      tells: it is plain, and tells what is padding: it is made of a mask or of a comparison, and
        not of numbers alone, as an encoding of positions is.
      is_static: it does not depend on the inputs.
      lost: the primitive behind which it is not known any more where its positions are; "" for
        none.
    """

    axes: tuple[Axis, ...]
    is_plain: bool = False
    tells: bool = False
    is_static: bool = False
    lost: str = ""

    @property
    def parts(self) -> list[Part]:
        return [part for axis in self.axes for part in axis]

    @property
    def has_positions(self) -> bool:
        return any(part.is_position for part in self.parts)

    @property
    def is_placed(self) -> bool:
        """Whether there are positions, and one axis of samples that tells whose they are."""
        return self.has_positions and [part.mark for part in self.parts].count(BATCH) == 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(math.prod(part.size for part in axis) for axis in self.axes)

    def without_leading(self, name: str) -> Known:
        """One step of what a loop goes through."""
        step = dataclasses.replace(self, axes=self.axes[1:])
        # Positions that were placed and are not any more: the step does not tell whose they are.
        is_lost = self.is_placed and not step.is_placed
        return dataclasses.replace(step, lost=self.lost or (name if is_lost else ""))

    def with_leading(self, axis: Axis) -> Known:
        """The results of all steps of a loop."""
        every = dataclasses.replace(self, axes=(axis, *self.axes))
        # With the axis of samples back, positions are known again.
        return dataclasses.replace(every, lost="" if every.is_placed else every.lost)


def nothing(shape: Sequence[int], is_static: bool = False, lost: str = "") -> Known:
    """A tensor of which nothing is known."""
    return Known(tuple((Part(size),) for size in shape), is_static=is_static, lost=lost)


def of_input(shape: Sequence[int], mask: int | None, is_plain: bool, tells: bool) -> Known:
    """An input of the model, whose first two axes are those of a mask, or None."""
    axes = list(nothing(shape).axes)
    if mask is not None:
        axes[:2] = (Part(shape[0], BATCH),), (Part(shape[1], mask),)
    return Known(tuple(axes), is_plain=is_plain, tells=tells)


def join(each: Sequence[Known], name: str) -> Known:
    """A tensor that is one of these, all of one shape; what is static may be anything.

    Args:
      each: at least one.
      name: of the primitive that chooses.
    """
    # Numbers alone are anybody's: they take the axes of what they are chosen beside.
    depends = [known for known in each if not known.is_static]
    if not depends:
        return each[0]
    axes = tuple(agreed(axes) for axes in zip(*(known.axes for known in depends), strict=True))
    is_plain = all(known.is_plain for known in depends)
    tells = is_plain and any(known.tells for known in depends)
    found = Known(axes, is_plain=is_plain, tells=tells)
    return dataclasses.replace(found, lost=still_lost(found, depends, name))


def agreed(axes: Sequence[Axis]) -> Axis:
    """The axis of an elementwise result, given those of its operands, all of one size.

    Where one of them is known and the others are not, it is the known one: each entry belongs to
    the position that any of its operands belongs to.
    """

    # Axes without a mark say nothing, and do not contradict.
    known = [axis for axis in axes if any(part.mark is not None for part in axis)]
    if not known:
        return axes[0]
    size = math.prod(part.size for part in known[0])
    # Axes with different marks that meet element by element are one axis from here on.
    marks = {tuple((part.size, part.mark) for part in axis) for axis in known}
    if len(marks) > 1:
        parts = [part for axis in known for part in axis]
        met = frozenset(p.mark for p in parts if p.mark is not None and p.is_position)
        return (Part(size, met=met if len(met) > 1 else frozenset()),)
    columns = zip(*known, strict=True)
    return tuple(parts[0]._replace(filled=any(p.filled for p in parts)) for parts in columns)


def leading(each: Sequence[Known], length: int) -> Axis:
    """The axis of a loop's steps, so many, given what it goes through."""
    axes = [known.axes[0] for known in each if not known.is_static]
    return agreed(axes) if axes else (Part(length),)


def still_lost(found: Known, operands: Sequence[Known], name: str) -> str:
    """What `lost` is of a result.

    Args:
      found: it.
      operands: what it is made of.
      name: of the primitive that makes it.
    """
    if found.is_placed:
        return ""
    before = next((known.lost for known in operands if known.lost), "")
    return before or (name if any(known.is_placed for known in operands) else "")


def has_positions(axis: Axis) -> bool:
    return any(part.is_position for part in axis)


def made(
    axes: Sequence[Axis], operands: Sequence[Known], lost: str = "", is_plain: bool | None = None
) -> Known:
    """A result of these axes, `lost` where a rule says so or an operand was before.

    It is plain, and tells what is padding, as its operands do, where `is_plain` is not given.
    """
    if is_plain is None:
        is_plain = all(x.is_plain or x.is_static for x in operands)
    tells = is_plain and any(x.tells for x in operands)
    found = Known(tuple(axes), is_plain=is_plain, tells=tells)
    before = next((x.lost for x in operands if x.lost), "")
    return found if found.is_placed else dataclasses.replace(found, lost=lost or before)
