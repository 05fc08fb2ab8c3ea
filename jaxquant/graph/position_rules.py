"""What becomes of the axes of samples and positions in each of JAX's primitives.

A rule gives what is known of an equation's results; for a primitive without one nothing is known
of them, and they tell behind which primitive that was lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from jaxquant.graph import ir, moved_parts, primitives
from jaxquant.graph.axis_parts import (
    Axis,
    Known,
    Part,
    agreed,
    has_positions,
    made,
    nothing,
    still_lost,
)

Rule: TypeAlias = Callable[[ir.Graph, ir.Equation, Sequence[Known]], Known]
_ALL_OUTPUTS = frozenset({"sort", "optimization_barrier"})  # each is like its own operand
# What is added of these tells where a position is, not of padding.
_ENCODES = frozenset({"sin", "cos"})
_COUNTS = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_POOLINGS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_FILL = 1e3  # a number as large as this tells of padding, as the -1e4 of (1 - mask) * -1e4


def through(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> list[Known]:
    """What is known of the results of an equation without a body, given its operands."""
    return [_told(x, operands, eqn.name) for x in _results(graph, eqn, operands)]


def _results(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> list[Known]:
    shapes = [graph.shape(var) for var in eqn.outputs]
    if eqn.name in _ALL_OUTPUTS:
        return [moved_parts.moved_along(graph, eqn, [own]) for own in operands]
    if eqn.name == "split":
        return [moved_parts.entries_of(operands[0], shape, eqn) for shape in shapes]
    # An operation without a rule forgets; what was lost is told by its name.
    rule = _rule(graph, eqn)
    if rule is None:
        found = [nothing(shape) for shape in shapes]
        return [dataclasses.replace(x, lost=still_lost(x, operands, eqn.name)) for x in found]
    given = rule(graph, eqn, operands)
    # What a rule does not say was lost may have been lost before.
    behind = given.lost or still_lost(nothing(()), operands, eqn.name)
    return [given if given.sizes == shape else nothing(shape, lost=behind) for shape in shapes]


def _told(found: Known, operands: Sequence[Known], name: str) -> Known:
    """A result that tells where its samples were lost though its positions are known.

    A concatenation along the samples leaves such: of what sample a position is, nobody knows.
    """
    if found.lost or found.is_placed or not found.has_positions:
        return found
    return dataclasses.replace(found, lost=name if any(x.is_placed for x in operands) else "")


def _rule(graph: ir.Graph, eqn: ir.Equation) -> Rule | None:
    if eqn.index in graph.contractions:
        return _contraction
    if eqn.name in primitives.ELEMENTWISE:
        return _elementwise
    return _RULES.get(eqn.name)


def _elementwise(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """What goes on through an elementwise operation, which may fill padding or make it zeros."""
    shape = graph.shape(eqn.outputs[0])

    # Operands of fewer axes are numbers or vectors, which broadcast.
    whole = [x for x in operands if len(x.axes) == len(shape)]
    axes = [agreed(_of_size(each, n)) for each, n in zip(zip(*(x.axes for x in whole)), shape)]
    # exp of a masked score is 0, whatever filled it: what is summed after that is of no padding.
    if eqn.name in ("exp", "exp2", "logistic"):
        axes = [tuple(part._replace(filled=False) for part in axis) for axis in axes]
    masks = [x for x in whole if x.tells]
    is_mixed = not all(x.is_plain or x.is_static for x in operands)
    # A mask has been applied: the positions that it tells of hold a fill, not activations.
    if is_mixed and not _leaves_zeros(graph, eqn):
        filled = {k for x in masks for k, axis in enumerate(x.axes) if has_positions(axis)}
        axes = [
            tuple(part._replace(filled=part.is_position) for part in axis) if k in filled else axis
            for k, axis in enumerate(axes)
        ]
    found = made(axes, operands, is_plain=False if eqn.name in _ENCODES else None)
    tells = found.tells or (found.is_plain and _is_telling(graph, eqn))
    return dataclasses.replace(found, tells=tells, lost=still_lost(found, operands, eqn.name))


def _is_telling(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether an operation on ids tells padding apart: a comparison, or a number so large."""
    if eqn.name in _COMPARES:
        return True
    numbers = [primitives.constant_scalar(graph, x) or 0.0 for x in eqn.inputs]
    # A quotient by a large number is a scaling.
    return eqn.name != "div" and any(abs(number) >= _FILL for number in numbers)


def _of_size(axes: Sequence[Axis], size: int) -> list[Axis]:
    """The axes of operands that are not repeated along that of the result."""
    # An axis of size 1 is repeated, and says nothing of the entries.
    fitting = [axis for axis in axes if math.prod(part.size for part in axis) == size]
    return fitting or [(Part(size),)]


def _leaves_zeros(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether what a mask makes of padding is zero, which is on every grid, or nothing special.

    A choice between activations, such as that of an embedding for hidden words, fills in nothing.
    """
    if eqn.name == "select_n":
        numbers = [primitives.constant_scalar(graph, case) for case in eqn.inputs[1:]]
        return 0.0 in numbers or not any(numbers)
    # Times a mask: zeros where it is False.
    return eqn.name == "mul"


def _contraction(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Batch and free axes go on; what is summed over is gone, whatever its positions hold."""
    contraction = graph.contractions[eqn.index]
    shape = graph.shape(eqn.outputs[0])
    places: dict[int, list[Axis]] = {}
    # Both operands have batch axes, which meet.
    for side, own in enumerate(operands[:2]):
        for axis, parts in enumerate(own.axes):
            place = contraction.place(side, axis)
            if place is not None:
                places.setdefault(place, []).append(parts)
    lost = ""
    if (window := contraction.window) is not None:
        first, kernel = contraction.operands
        kernel_shape = graph.shape(eqn.inputs[1])
        for number, axis in enumerate(first.window):
            # A kernel of one position, unstrided, moves nothing: each position stays by itself.
            is_apart = (
                kernel_shape[kernel.window[number]] == 1
                and window.strides[number] == window.input_dilation[number] == 1
                and window.padding[number] == (0, 0)
            )
            if is_apart:
                places[contraction.result.window[number]] = [operands[0].axes[axis]]
            elif has_positions(operands[0].axes[axis]):
                lost = eqn.name
    axes = [agreed(places[k]) if k in places else (Part(size),) for k, size in enumerate(shape)]
    is_plain = all(x.is_plain for x in operands)  # pairs of positions, of two masks
    return made(axes, operands, lost, is_plain=is_plain)


def _without(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A reduction: of what it is over nothing is left."""
    gone = eqn.params["axes"]
    return made([x for k, x in enumerate(operands[0].axes) if k not in gone], operands)


def _same(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    return made(operands[0].axes, operands)


def _counted(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Numbers of the positions, as a running sum of a mask gives them, tell of padding no more."""
    return dataclasses.replace(made(operands[0].axes, operands), tells=False)


_RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": moved_parts.spread,
    "concatenate": moved_parts.concatenated,
    **dict.fromkeys(("copy", "copy_p", *primitives.PLACEMENTS), _same),
    "dynamic_slice": moved_parts.sliced,
    "dynamic_update_slice": moved_parts.updated,
    "expand_dims": moved_parts.reshaped,
    "gather": moved_parts.gathered,
    "pad": moved_parts.padded,
    **dict.fromkeys(_POOLINGS, moved_parts.pooled),
    "reshape": moved_parts.reshaped,
    "rev": moved_parts.moved_along,
    "slice": moved_parts.sliced,
    "squeeze": moved_parts.reshaped,
    "stack": moved_parts.stacked,
    "transpose": moved_parts.transposed,
    **dict.fromkeys(_COUNTS, _counted),
    **dict.fromkeys(
        ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum"),
        _without,
    ),
}  # fmt: skip
