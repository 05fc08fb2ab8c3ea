"""What becomes of the parts of axes where values are moved: reshaped, sliced, put together, picked.

Each is a rule of `jaxquant.graph.position_rules`: a function of the graph, the equation and what is
known of its operands, which gives what is known of its result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxquant.graph import ir
from jaxquant.graph.axis_parts import Axis, Known, Part, agreed, has_positions, made


def spread(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    shape, (own,) = graph.shape(eqn.outputs[0]), operands[:1]
    axes: list[Axis] = [(Part(size),) for size in shape]
    sizes = own.sizes
    for axis, place in enumerate(eqn.params["broadcast_dimensions"]):
        if sizes[axis] == shape[place]:
            axes[place] = own.axes[axis]
    return made(axes, operands)


def transposed(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    return made([operands[0].axes[k] for k in eqn.params["permutation"]], operands)


def reshaped(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """The parts of all axes go into the new ones, in their order; those without a mark split."""
    own, shape = operands[0], graph.shape(eqn.outputs[0])
    parts = [part for part in own.parts if part.size != 1 or part.mark is not None]
    is_moved = eqn.name == "reshape" and eqn.params.get("dimensions") is not None
    axes = None if is_moved else _dealt(parts, shape)
    if axes is None:
        return made([(Part(size),) for size in shape], operands, _lost_by(eqn, own))
    return made(axes, operands)


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


def sliced(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Some entries along some axes: one of them is chosen, of several the positions are lost."""
    return entries_of(operands[0], graph.shape(eqn.outputs[0]), eqn)


def entries_of(own: Known, shape: Sequence[int], eqn: ir.Equation) -> Known:
    """What is known of some entries of an operand, of this shape; see `sliced`."""
    axes, lost = [], ""
    for axis, before, size in zip(own.axes, own.sizes, shape, strict=True):
        axes.append(axis if size == before else (Part(size),))
        if size not in (before, 1) and has_positions(axis):
            lost = eqn.name
    return made(axes, [own], lost)


def concatenated(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A concatenation."""
    along, depend = eqn.params["dimension"], [x for x in operands if not x.is_static]
    shape = graph.shape(eqn.outputs[0])
    axes = [agreed([x.axes[k] for x in depend]) for k in range(len(shape))]
    lost = eqn.name if any(has_positions(x.axes[along]) for x in depend) else ""
    axes[along] = (Part(shape[along]),)
    return made(axes, operands, lost)


def stacked(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """Tensors side by side along a new axis."""
    depend = [x for x in operands if not x.is_static]
    axes = [agreed(each) for each in zip(*(x.axes for x in depend), strict=True)]
    axes.insert(eqn.params["axis"], (Part(len(operands)),))
    return made(axes, operands)


def padded(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """More entries along some axes: of features, say; of positions it is lost where they are."""
    own = operands[0]
    axes, lost = list(own.axes), ""
    for axis, (pads, size) in enumerate(
        zip(eqn.params["padding_config"], graph.shape(eqn.outputs[0]), strict=True)
    ):
        if any(pads):
            axes[axis] = (Part(size),)
            lost = eqn.name if has_positions(own.axes[axis]) else lost
    return made(axes, operands, lost)


def pooled(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A pooling: the axes that its windows do not go along stay."""
    own, params = operands[0], eqn.params
    columns = zip(
        params["window_dimensions"], params["window_strides"], params["padding"],
        params["base_dilation"], params["window_dilation"], strict=True,
    )  # fmt: skip
    is_apart = [each == (1, 1, (0, 0), 1, 1) for each in columns]
    sizes = graph.shape(eqn.outputs[0])
    axes = [own.axes[k] if stays else (Part(sizes[k]),) for k, stays in enumerate(is_apart)]
    is_lost = any(has_positions(own.axes[k]) for k, stays in enumerate(is_apart) if not stays)
    return made(axes, operands, eqn.name if is_lost else "")


def updated(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """A cache with a part that is written anew: what it holds elsewhere is of other positions."""
    whole, part = operands[:2]
    axes, lost = [], ""
    for own, new, sizes in zip(
        whole.axes, part.axes, zip(whole.sizes, part.sizes, strict=True), strict=True
    ):
        axes.append(agreed([own, new]) if sizes[0] == sizes[1] else own)
        if sizes[0] != sizes[1] and (has_positions(new) or has_positions(own)):
            lost = eqn.name
    return made(axes, operands, lost)


def moved_along(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
    """What is moved along an axis loses its positions."""
    (own,) = operands
    moved = {eqn.params[name] for name in ("dimension",) if name in eqn.params}
    moved.update(eqn.params.get("dimensions", ()))
    axes = [(Part(own.sizes[k]),) if k in moved else axis for k, axis in enumerate(own.axes)]
    is_lost = any(has_positions(own.axes[k]) for k in moved)
    return made(axes, operands, eqn.name if is_lost else "")


def gathered(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Known]) -> Known:
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
        elif sizes[k] != 1 and has_positions(own.axes[k]):
            lost = eqn.name
    picked = [own.axes[k] for k in collapsed if own.sizes[k] != 1]
    if any(map(has_positions, picked)) and math.prod(places.sizes[:-1]) != 1:
        # One position of each sample is chosen; of several it is not known whose they are.
        chosen = [k for k in outside if not any(p.mark is not None for p in axes[k])]
        lost = eqn.name if any(shape[k] != 1 for k in chosen) else lost
    return made(axes, operands, lost, is_plain=own.is_plain)
