"""Along which axes a static tensor only repeats itself: what was broadcast, tiled or repeated.

A learned query that is spread over the batch, and what is computed of it (a projection, a
normalisation), holds the same values for every sample.  So it is stored once, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxquant.graph import ir, primitives
from jaxquant.graph.once import once

Axes = frozenset[int]


def varying_axes(graph: ir.Graph, atom: ir.Atom) -> Axes:
    """The axes of a static tensor along which its values may differ; others hold copies.

    An axis of size 1 is none of them.  Where an operation is not known, every axis may vary.
    """
    if isinstance(atom, ir.Literal):
        return frozenset()
    # What no rule is known of may vary along every axis.
    return _search(graph).get(atom, _every(graph, atom))


def without_copies(graph: ir.Graph, var: ir.Var, value: Any) -> Any:
    """A static tensor's value with size 1 along the axes that hold copies."""
    axes = varying_axes(graph, var)
    return value[tuple(slice(None) if d in axes else slice(0, 1) for d in range(value.ndim))]


def shape_without_copies(graph: ir.Graph, var: ir.Var) -> tuple[int, ...]:
    """The shape of a static tensor with size 1 along the axes that hold copies."""
    axes = varying_axes(graph, var)
    return tuple(n if d in axes else 1 for d, n in enumerate(graph.shape(var)))


@once
def _search(graph: ir.Graph) -> dict[ir.Var, Axes]:
    """The varying axes of every static tensor for which they are known."""
    found: dict[ir.Var, Axes] = {}

    def of(atom: ir.Atom) -> Axes:
        if isinstance(atom, ir.Literal):
            return frozenset()
        return found[atom] if atom in found else _every(graph, atom)

    for eqn in graph.equations:
        if not eqn.outputs or not graph.static[eqn.outputs[0]]:
            continue
        for var in eqn.outputs:
            # An axis along which a tensor does not vary holds copies of one slice.
            axes = _of_output(graph, eqn, [of(x) for x in eqn.inputs])
            if axes is not None:
                # An axis of size 1 has one value, of which there are no copies.
                found[var] = axes & _every(graph, var)
    return found


def _every(graph: ir.Graph, var: ir.Var) -> Axes:
    return frozenset(d for d, size in enumerate(graph.shape(var)) if size != 1)


def _of_output(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes | None:
    """The varying axes of an equation's outputs, given those of its operands; None: not known.

    Axes of size 1 may be among them.
    """
    if primitives.is_elementwise(eqn) or eqn.name == "reduce_precision":
        # a scalar operand varies along nothing; the others have the rank of the result
        return frozenset().union(*operands)
    if eqn.index in graph.contractions:
        return graph.contractions[eqn.index].varying(operands)
    rule = _RULES.get(eqn.name)
    return None if rule is None else rule(graph, eqn, operands)


def _same(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    return frozenset().union(*operands)


def _broadcast(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    placed = eqn.params["broadcast_dimensions"]
    return frozenset(placed[d] for d in operands[0]) if placed else frozenset()


def _iota(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    return frozenset({eqn.params["dimension"]})


def _transpose(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    order = eqn.params["permutation"]
    return frozenset(d for d, source in enumerate(order) if source in operands[0])


def _reshape(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes | None:
    before, after = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0])
    # A reshape that orders the axes too is rare, and not followed.
    if eqn.params.get("dimensions") is not None:
        return None
    # Axes that are merged vary where any of them does.
    groups = primitives.reshaped_axes(before, after)
    return frozenset(d for old, new in groups if operands[0] & set(old) for d in new)


def _drop(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    """Axes leave: a reduction, a squeeze."""
    gone = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    kept = [d for d in range(len(graph.shape(eqn.inputs[0]))) if d not in gone]
    union = frozenset().union(*operands)
    return frozenset(d for d, source in enumerate(kept) if source in union)


def _along(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    """Cumulative sums and concatenations: the result varies along their own axis."""
    key = "axis" if "axis" in eqn.params else "dimension"
    return frozenset({eqn.params[key]}).union(*operands)


def _stack(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    axis = eqn.params["axis"]
    return frozenset({axis} | {d + (d >= axis) for d in frozenset().union(*operands)})


def _pad(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    padded = {d for d, pads in enumerate(eqn.params["padding_config"]) if any(pads)}
    return operands[0] | padded


def _part(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    """A slice, a tile or a split: what comes behind the first operand says where or how often."""
    return operands[0]


def _update(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes:
    whole, part = graph.shape(eqn.inputs[0]), graph.shape(eqn.inputs[1])
    # What is cut is written at one place of many, so these differ along it.
    cut = {d for d, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b}
    return operands[0] | operands[1] | cut


def _gather(graph: ir.Graph, eqn: ir.Equation, operands: Sequence[Axes]) -> Axes | None:
    numbers = eqn.params["dimension_numbers"]
    # Batched gathers pair their axes; not followed.
    if numbers.operand_batching_dims:
        return None
    rank = len(graph.shape(eqn.outputs[0]))
    kept = [
        d for d in range(len(graph.shape(eqn.inputs[0]))) if d not in numbers.collapsed_slice_dims
    ]
    # The result varies along what it takes of the operand, and along what its indices vary in.
    found = {out for out, d in zip(numbers.offset_dims, kept, strict=True) if d in operands[0]}
    places = [d for d in range(rank) if d not in numbers.offset_dims]
    return frozenset(found | {out for n, out in enumerate(places) if n in operands[1]})


_Rule = Callable[[ir.Graph, ir.Equation, Sequence[Axes]], "Axes | None"]
_RULES: Mapping[str, _Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _along,
    "dynamic_slice": _part,
    "dynamic_update_slice": _update,
    "expand_dims": _reshape,
    "gather": _gather,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _same,
    "slice": _part,
    "sort": _same,
    "split": _part,
    "squeeze": _drop,
    "stack": _stack,
    "tile": _part,
    "transpose": _transpose,
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along),
    **dict.fromkeys(
        ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
         "reduce_sum"),
        _drop,
    ),
}  # fmt: skip
