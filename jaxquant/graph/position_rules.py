"""What becomes of the axes of samples and positions in each of JAX's primitives.

A rule gives what is known of an equation's results; for a primitive without one nothing is known
of them, and they tell behind which primitive that was lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from jaxquant.graph import ir, primitives
from jaxquant.graph.axis_parts import Axis, Known, Part, agreed, nothing, still_lost

Rule: TypeAlias = Callable[[ir.Graph, ir.Equation, Sequence[Known]], Known]
_ALL_OUTPUTS = frozenset({"sort", "optimization_barrier"})  # each is like its own operand
# What is added of these tells where a position is, not of padding.
_ENCODES = frozenset({"sin", "cos"})
_COUNTS = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
_COMPARES = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
_FILL = 1e3  # a number as large as this tells of padding, as the -1e4 of (1 - mask) * -1e4


def through(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> list[Known]:
    """What is known of the results of an equation without a body, given its operands."""
    return [_told(x, operands, eqn.name) for x in _results(graph, eqn, operands)]


def _results(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> list[Known]:
    shapes = [graph.shape(var) for var in eqn.outputs]
    if eqn.name in _ALL_OUTPUTS:
        return [_sorted(graph, eqn, [own]) for own in operands]
    if eqn.name == "split":
        return [_entries_of(operands[0], shape, eqn) for shape in shapes]
    # An operation without a rule forgets; what was lost is told by its name.
    rule = _rule(graph, eqn)
    if rule is None:
        found = [nothing(shape) for shape in shapes]
        return [dataclasses.replace(x, lost=still_lost(x, operands, eqn.name)) for x in found]
    made = rule(graph, eqn, operands)
    behind = made.lost or still_lost(nothing(()), operands, eqn.name)
    return [made if made.sizes == shape else nothing(shape, lost=behind) for shape in shapes]


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


def _made(
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


def _elementwise(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """What goes on through an elementwise operation, which may fill padding or make it zeros."""
    shape = graph.shape(eqn.outputs[0])
    whole = [x for x in operands if len(x.axes) == len(shape)]
    axes = [agreed(_of_size(each, n)) for each, n in zip(zip(*(x.axes for x in whole)), shape)]
    # exp of a masked score is 0, whatever filled it: what is summed after that is of no padding.
    if eqn.name in ("exp", "exp2", "logistic"):
        axes = [tuple(part._replace(filled=False) for part in axis) for axis in axes]
    masks = [x for x in whole if x.tells]
    is_mixed = not all(x.is_plain or x.is_static for x in operands)
    # A mask has been applied: the positions that it tells of hold a fill, not activations.
    if is_mixed and not _leaves_zeros(graph, eqn):
        filled = {k for x in masks for k, axis in enumerate(x.axes) if _has_positions(axis)}
        axes = [
            tuple(part._replace(filled=part.is_position) for part in axis) if k in filled else axis
            for k, axis in enumerate(axes)
        ]
    found = _made(axes, operands, is_plain=False if eqn.name in _ENCODES else None)
    tells = found.tells or (found.is_plain and _is_telling(graph, eqn))
    return dataclasses.replace(found, tells=tells, lost=still_lost(found, operands, eqn.name))


def _is_telling(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether an operation on ids tells padding apart: a comparison, or a number so large."""
    if eqn.name in _COMPARES:
        return True
    numbers = [primitives.constant_scalar(graph, x) or 0.0 for x in eqn.inputs]
    return eqn.name != "div" and any(abs(number) >= _FILL for number in numbers)


def _of_size(axes: Sequence[Axis], size: int) -> list[Axis]:
    """The axes of operands that are not repeated along that of the result."""
    fitting = [axis for axis in axes if math.prod(part.size for part in axis) == size]
    return fitting or [(Part(size),)]


def _has_positions(axis: Axis) -> bool:
    return any(part.is_position for part in axis)


def _leaves_zeros(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether what a mask makes of padding is zero, which is on every grid, or nothing special.

    A choice between activations, such as that of an embedding for hidden words, fills in nothing.
    """
    if eqn.name == "select_n":
        numbers = [primitives.constant_scalar(graph, case) for case in eqn.inputs[1:]]
        return 0.0 in numbers or not any(numbers)
    return eqn.name == "mul"


def _contraction(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Batch and free axes go on; what is summed over is gone, whatever its positions hold."""
    contraction = graph.contractions[eqn.index]
    shape = graph.shape(eqn.outputs[0])
    places: dict[int, list[Axis]] = {}
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
            elif _has_positions(operands[0].axes[axis]):
                lost = eqn.name
    axes = [agreed(places[k]) if k in places else (Part(size),) for k, size in enumerate(shape)]
    is_plain = all(x.is_plain for x in operands)  # pairs of positions, of two masks
    return _made(axes, operands, lost, is_plain=is_plain)


def _broadcast(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    shape, (own,) = graph.shape(eqn.outputs[0]), operands[:1]
    axes: list[Axis] = [(Part(size),) for size in shape]
    sizes = own.sizes
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        if sizes[axis] == shape[place]:
            axes[place] = own.axes[axis]
    return _made(axes, operands)


def _transpose(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    return _made([operands[0].axes[k] for k in eqn.params["permutation"]], operands)


def _reshape(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """The parts of all axes go into the new ones, in their order; those without a mark split."""
    own, shape = operands[0], graph.shape(eqn.outputs[0])
    parts = [part for part in own.parts if part.size != 1 or part.mark is not None]
    is_moved = eqn.name == "reshape" and eqn.params.get("dimensions") is not None
    axes = None if is_moved else _dealt(parts, shape)
    if axes is None:
        return _made([(Part(size),) for size in shape], operands, _lost_by(eqn, own))
    return _made(axes, operands)


def _dealt(parts: list[Part], shape: Sequence[int]) -> list[Axis] | None:
    """Axes of these sizes made of parts; None where a part with a mark had to be split."""
    axes: list[list[Part]] = []
    for size in shape:
        axis: list[Part] = []
        left = size
        # Parts fill the sizes in order; one may be cut in two only where nothing is known of it.
        while parts and (left != 1 or (parts[0].size == 1 and not axis)):
            part = parts[0]
            if left % part.size == 0:
                parts, left = parts[1:], left // part.size
                axis.append(part)
            elif part.mark is None and part.size % left == 0:
                parts = [Part(part.size // left), *parts[1:]]
                axis.append(Part(left))
                left = 1
            else:
                return None
        axes.append(axis)
    if axes:
        axes[-1] += parts  # of size 1
    return [tuple(axis) or (Part(size),) for axis, size in zip(axes, shape, strict=True)]


def _lost_by(eqn: ir.Equation, *operands: Known) -> str:
    return eqn.name if any(x.has_positions for x in operands) else ""


def _without(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A reduction: of what it is over nothing is left."""
    gone = eqn.params["axes"]
    return _made([x for k, x in enumerate(operands[0].axes) if k not in gone], operands)


def _part(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Some entries along some axes: one of them is chosen, of several the positions are lost."""
    return _entries_of(operands[0], graph.shape(eqn.outputs[0]), eqn)


def _entries_of(own: Known, shape: Sequence[int], eqn: ir.Equation) -> Known:
    """What is known of some entries of an operand, of this shape; see `_part`."""
    axes, lost = [], ""
    for axis, before, size in zip(own.axes, own.sizes, shape, strict=True):
        axes.append(axis if size == before else (Part(size),))
        if size not in (before, 1) and _has_positions(axis):
            lost = eqn.name
    return _made(axes, [own], lost)


def _along(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A concatenation."""
    along, depend = eqn.params["dimension"], [x for x in operands if not x.is_static]
    shape = graph.shape(eqn.outputs[0])
    axes = [agreed([x.axes[k] for x in depend]) for k in range(len(shape))]
    lost = eqn.name if any(_has_positions(x.axes[along]) for x in depend) else ""
    axes[along] = (Part(shape[along]),)
    return _made(axes, operands, lost)


def _stack(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Tensors side by side along a new axis."""
    depend = [x for x in operands if not x.is_static]
    axes = [agreed(each) for each in zip(*(x.axes for x in depend), strict=True)]
    axes.insert(eqn.params["axis"], (Part(len(operands)),))
    return _made(axes, operands)


def _pad(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """More entries along some axes: of features, say; of positions it is lost where they are."""
    own = operands[0]
    axes, lost = list(own.axes), ""
    for axis, (pads, size) in enumerate(
        zip(eqn.params["padding_config"], graph.shape(eqn.outputs[0]), strict=True)
    ):
        if any(pads):
            axes[axis] = (Part(size),)
            lost = eqn.name if _has_positions(own.axes[axis]) else lost
    return _made(axes, operands, lost)


def _update(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A cache with a part that is written anew: what it holds elsewhere is of other positions."""
    whole, part = operands[:2]
    axes, lost = [], ""
    for own, new, sizes in zip(
        whole.axes, part.axes, zip(whole.sizes, part.sizes, strict=True), strict=True
    ):
        axes.append(agreed([own, new]) if sizes[0] == sizes[1] else own)
        if sizes[0] != sizes[1] and (_has_positions(new) or _has_positions(own)):
            lost = eqn.name
    return _made(axes, operands, lost)


def _same(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    return _made(operands[0].axes, operands)


def _counted(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Numbers of the positions, as a running sum of a mask gives them, tell of padding no more."""
    return dataclasses.replace(_made(operands[0].axes, operands), tells=False)


def _sorted(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """What is moved along an axis loses its positions."""
    (own,) = operands
    moved = {eqn.params[name] for name in ("dimension",) if name in eqn.params}
    moved.update(eqn.params.get("dimensions", ()))
    axes = [(Part(own.sizes[k]),) if k in moved else axis for k, axis in enumerate(own.axes)]
    is_lost = any(_has_positions(own.axes[k]) for k in moved)
    return _made(axes, operands, eqn.name if is_lost else "")


def _gather(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Rows by index: each belongs where its index does.  Whole slices keep their own axes."""
    own, places = operands[:2]
    numbers, shape = eqn.params["dimension_numbers"], graph.shape(eqn.outputs[0])
    sizes, collapsed = eqn.params["slice_sizes"], numbers.collapsed_slice_dims
    batching = numbers.operand_batching_dims
    axes: list[Axis] = [(Part(size),) for size in shape]
    outside = [k for k in range(len(shape)) if k not in numbers.offset_dims]
    for k, axis in zip(outside, places.axes[:-1], strict=True):
        axes[k] = axis
    for mine, theirs in zip(batching, numbers.start_indices_batching_dims, strict=True):
        place = outside[theirs]
        axes[place] = agreed([axes[place], own.axes[mine]])
    kept = [k for k in range(len(own.axes)) if k not in (*collapsed, *batching)]
    lost = ""
    for place, k in zip(numbers.offset_dims, kept, strict=True):
        if sizes[k] == own.sizes[k]:
            axes[place] = own.axes[k]
        elif sizes[k] != 1 and _has_positions(own.axes[k]):
            lost = eqn.name
    picked = [own.axes[k] for k in collapsed if own.sizes[k] != 1]
    if any(map(_has_positions, picked)) and math.prod(places.sizes[:-1]) != 1:
        # One position of each sample is chosen; of several it is not known whose they are.
        chosen = [k for k in outside if not any(p.mark is not None for p in axes[k])]
        lost = eqn.name if any(shape[k] != 1 for k in chosen) else lost
    return _made(axes, operands, lost, is_plain=own.is_plain)


_RULES: Mapping[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along,
    "copy": _same,
    "copy_p": _same,
    "dynamic_slice": _part,
    "dynamic_update_slice": _update,
    "expand_dims": _reshape,
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _sorted,
    "slice": _part,
    "squeeze": _reshape,
    "stack": _stack,
    "transpose": _transpose,
    **dict.fromkeys(_COUNTS, _counted),
    **dict.fromkeys(
        ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum"),
        _without,
    ),
}  # fmt: skip
