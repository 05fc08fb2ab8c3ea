"""Whether an equation leaves rows where they are: entry by entry along one axis of its operand.

A row is what lies behind one index of an axis: a sample of a batch, or a step of a sequence that
has none.  Elementwise equations, dots and the like make each row of a result of the same row; what
reverses, shifts, sorts or sums the rows does not, whatever stays of its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from jaxquant.graph import ir, position_rules
from jaxquant.graph.axis_parts import BATCH, Axis, Known, Part, nothing
from jaxquant.graph.once import once

# The axes of a tensor, of whose parts one is that of the rows (its mark is BATCH).
Rows: TypeAlias = tuple[Axis, ...]
_RUNNING = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})


def rows_along(shape: Sequence[int], axis: int) -> Rows:
    """The rows of a tensor of this shape that one of its axes tells apart."""
    axes = list(nothing(shape).axes)
    axes[axis] = (Part(shape[axis], BATCH),)
    return tuple(axes)


def axis_of(rows: Rows) -> int:
    """The axis that the rows lie along."""
    return next(k for k, axis in enumerate(rows) if any(part.mark == BATCH for part in axis))


def is_whole(rows: Rows) -> bool:
    """Whether each index of their axis is a row of its own."""
    return len(rows[axis_of(rows)]) == 1


def sizes_around(rows: Rows) -> tuple[int, int, int]:
    """How an axis of rows is made up: entries before, the rows, and entries within each."""
    axis = rows[axis_of(rows)]
    place = next(k for k, part in enumerate(axis) if part.mark == BATCH)
    before, within = axis[:place], axis[place + 1 :]
    return _size(before), axis[place].size, _size(within)


@once
def through(graph: ir.Graph, eqn: ir.Equation, number: int, rows: Rows) -> tuple[Rows | None, ...]:
    """Where the rows of one operand are in each result; None where a row of it may read others.

    Args:
      graph: the traced model.
      eqn: an equation of it, of no loop or choice.
      number: which of its operands it is.
      rows: that operand's.
    """
    axis = axis_of(rows)
    if _moves(graph, eqn, number, axis):
        return (None,) * len(eqn.outputs)
    if eqn.name == "sort":  # what is sorted by others goes where these go
        return (rows,) * len(eqn.outputs)
    operands = [nothing(graph.shape(x)) for x in eqn.inputs]
    operands[number] = Known(rows)
    size = sizes_around(rows)[1]
    return tuple(_kept(found, size) for found in position_rules.through(graph, eqn, operands))


def _moves(graph: ir.Graph, eqn: ir.Equation, number: int, axis: int) -> bool:
    """Whether rows along an axis change places though the result has them too."""
    if eqn.name in _RUNNING:
        return bool(eqn.params["axis"] == axis)
    if eqn.name == "sort":
        return bool(eqn.params["dimension"] == axis)
    if eqn.name == "dynamic_update_slice" and number < 2:
        whole, part = (graph.shape(x)[axis] for x in eqn.inputs[:2])
        return bool(whole != part)
    return False


def _kept(found: Known, size: int) -> Rows | None:
    rows = rows_of(found)
    return rows if rows is not None and sizes_around(rows)[1] == size else None


def rows_of(known: Known) -> Rows | None:
    """The rows of a tensor by what is known of its axes; None where these have none, or several."""
    if [part.mark for part in known.parts].count(BATCH) != 1:
        return None
    return tuple(_plain(axis) for axis in known.axes)


def _plain(axis: Axis) -> Axis:
    """An axis by its rows alone: what lies before and within them is one part each."""
    marks = [part.mark for part in axis]
    if BATCH not in marks:
        return (Part(_size(axis)),)
    place = marks.index(BATCH)
    before, within = Part(_size(axis[:place])), Part(_size(axis[place + 1 :]))
    rows = Part(axis[place].size, BATCH)
    return tuple(part for part in (before, rows, within) if part is rows or part.size != 1)


def _size(parts: Sequence[Part]) -> int:
    return math.prod(part.size for part in parts)
