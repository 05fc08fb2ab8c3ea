"""Softmax, as JAX writes it: several equations around an exponential."""

from __future__ import annotations

import jax.numpy as jnp

from jaxquant.graph import copies, ir, matching, primitives


def match(graph: ir.Graph, division: ir.Equation) -> tuple[ir.Var, tuple[int, ...]] | None:
    """The source and the members of a softmax that ends in an equation; None of another equation.

    The source of a masked one are the scores before the mask.
    """
    found = _unmasked(graph, division)
    if found is None:
        return None
    source, members, _ = found
    source = _before_mask(graph, source, members)
    if not matching.is_private(graph, members, division.outputs[0]):
        return None
    return source, tuple(sorted(members))


def match_operator(graph: ir.Graph, division: ir.Equation) -> matching.Match | None:
    """The softmax along one axis that ends in an equation, behind its mask; None of others."""
    found = _unmasked(graph, division)
    if found is None or not matching.is_private(graph, found[1], division.outputs[0]):
        return None
    source, members, axes = found
    if len(axes) != 1:
        return None
    return matching.Match((source,), frozenset(members), {"axis": int(axes[0])})


def _unmasked(
    graph: ir.Graph, division: ir.Equation
) -> tuple[ir.Var, set[int], tuple[int, ...]] | None:
    """The source, the members and the axes of exp(x - m) / sum(exp(x - m)), for an m of x alone."""
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
    return source, members, axes


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
