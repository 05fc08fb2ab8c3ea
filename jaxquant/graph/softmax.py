"""Softmax, as JAX writes it: several equations around an exponential."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxquant.graph import copies, ir, matching, primitives


def match(graph: ir.Graph, division: ir.Equation) -> tuple[ir.Var, tuple[int, ...]] | None:
    """The source and the members of a softmax that ends in an equation; None of another equation.

    The source of a masked one are the scores before the mask.
    """
    found = _unmasked(graph, division)
    if found is None:
        return None
    source, members = found.source, set(found.members)
    source = _before_mask(graph, source, members)
    if not matching.is_private(graph, members, division.outputs[0]):
        return None
    return source, tuple(sorted(members))


def match_operator(graph: ir.Graph, division: ir.Equation) -> matching.Match | None:
    """The softmax along one axis that ends in an equation, behind its mask; None of others."""
    found = _unmasked(graph, division)
    if found is None or not matching.is_private(graph, found.members, division.outputs[0]):
        return None
    if len(found.axes) != 1 or found.axes[0] in _varying_axes(graph, found.shift, found.source):
        return None  # what differs along the axis does not cancel
    return matching.Match((found.source,), found.members, {"axis": int(found.axes[0])})


class _Unmasked(NamedTuple):
    """exp(x - m) / sum(exp(x - m)), for an m that is made of maxima of x, and of parameters.

    Attributes:
      source: x.
      shift: m.
      members: the indices of the equations.
      axes: of the sum.
    """

    source: ir.Var
    shift: ir.Atom
    members: frozenset[int]
    axes: tuple[int, ...]


def _unmasked(graph: ir.Graph, division: ir.Equation) -> _Unmasked | None:
    """What ends in a division; None of others."""
    if division.name != "div":
        return None
    numerator, denominator = division.inputs
    exponential = matching.producer(graph, numerator)
    if exponential is None or exponential.name != "exp":
        return None
    members = {division.index, exponential.index}
    total = _through_movement(graph, denominator, members)
    if total is None or total.name != "reduce_sum" or total.inputs[0] != numerator:
        return None
    members.add(total.index)
    shifted = matching.producer(graph, exponential.inputs[0])
    if shifted is None or shifted.name != "sub" or not isinstance(shifted.inputs[0], int):
        return None
    source, axes = shifted.inputs[0], tuple(total.params["axes"])
    members.add(shifted.index)
    stack = [shifted.inputs[1]]
    while stack:
        atom = stack.pop()
        if graph.is_static(atom) or atom == source:
            continue
        eqn = matching.producer(graph, atom)
        if eqn is None or eqn.name not in (
            "reduce_max", "max", "stop_gradient", "broadcast_in_dim", "reshape", "select_n",
            "is_finite",
        ):  # fmt: skip
            return None
        members.add(eqn.index)
        stack.extend(eqn.inputs)
    return _Unmasked(source, shifted.inputs[1], frozenset(members), axes)


def _varying_axes(graph: ir.Graph, atom: ir.Atom, source: ir.Var) -> frozenset[int]:
    """The axes along which what is subtracted from `source` may differ."""
    if atom == source:
        return frozenset(range(len(graph.shape(source))))
    eqn = matching.producer(graph, atom)
    if eqn is None or graph.is_static(atom):
        return copies.varying_axes(graph, atom)
    of_operands = (_varying_axes(graph, x, source) for x in eqn.inputs)
    return frozenset().union(*(primitives.follow_axes(graph, eqn, axes) for axes in of_operands))


def _before_mask(graph: ir.Graph, source: ir.Var, members: set[int]) -> ir.Var:
    """The scores of a masked softmax; the equations that mask them join `members`.

    A mask's -1e9 must not take part in the range of the scores.
    """
    while (eqn := graph.producer.get(source)) is not None:
        if eqn.name not in ("select_n", "add", "sub"):
            return source
        operands = eqn.inputs[1:] if eqn.name == "select_n" else eqn.inputs
        scores = [x for x in operands if not _is_mask(graph, x)]
        chooses = eqn.name == "select_n"  # then one value, -1e9 or -inf, is a mask too
        if not chooses and not any(_masks(graph, x) for x in operands if x not in scores):
            return source
        only_here = all(user.index in members for user in graph.consumers.get(source, ()))
        if len(scores) != 1 or not isinstance(scores[0], int) or not only_here:
            return source
        if source in graph.output_vars or (eqn.name == "sub" and scores[0] != eqn.inputs[0]):
            return source
        members.add(eqn.index)
        source = scores[0]
    return source


def _masks(graph: ir.Graph, atom: ir.Atom) -> bool:
    """False for one value that is added everywhere: the epilogue of the product absorbs it."""
    return not graph.is_static(atom) or bool(copies.varying_axes(graph, atom))


def _is_mask(graph: ir.Graph, atom: ir.Atom) -> bool:
    """True for values that come from parameters, constants, and truth values or integers alone."""
    stack, steps = [atom], 0
    while stack:
        atom = stack.pop()
        if graph.is_static(atom) or not jnp.issubdtype(graph.dtype(atom), jnp.floating):
            continue
        eqn, steps = matching.producer(graph, atom), steps + 1
        if eqn is None or steps > _MASK_STEPS:
            return False
        if not primitives.is_elementwise(eqn) and eqn.name not in _MASK_SHAPING:
            return False
        stack.extend(eqn.inputs)
    return True


_MASK_SHAPING = frozenset({"broadcast_in_dim", "reshape", "slice", "squeeze", "tile", "transpose"})
_MASK_STEPS = 32  # equations from truth values to a mask, at most


def _through_movement(graph: ir.Graph, atom: ir.Atom, members: set[int]) -> ir.Equation | None:
    eqn = matching.producer(graph, atom)
    while eqn is not None and eqn.name in ("broadcast_in_dim", "reshape", "stop_gradient"):
        members.add(eqn.index)
        eqn = matching.producer(graph, eqn.inputs[0])
    return eqn
