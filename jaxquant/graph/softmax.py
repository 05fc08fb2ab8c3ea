"""Softmax, as JAX writes it: several equations around an exponential."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import copies, ir, matching, primitives


def match(graph: ir.Graph, division: ir.Equation) -> tuple[ir.Var, tuple[int, ...]] | None:
    """The source and the members of a softmax that ends in an equation; None of another equation.

    The source of a masked one are the scores before the mask.
    """
    found = _unmasked(graph, division)
    if found is None:
        return None
    source, members = found.source, set(found.members)
    # The mask's number may be -1e9: what int8 sees is the scores before it.
    source = _before_mask(graph, source, members)
    if not matching.is_private(graph, members, division.outputs[0]):
        return None
    return source, tuple(sorted(members))


def match_operator(graph: ir.Graph, division: ir.Equation) -> matching.Match | None:
    """The softmax along one axis that ends in an equation, behind its mask; None of others."""
    found = _unmasked(graph, division, as_operator=True)
    if found is None or not matching.is_private(graph, found.members, division.outputs[0]):
        return None
    sources = _before_moves(graph, found.source)
    if len(found.axes) != 1 or found.axes[0] in _varying_axes(graph, found.shift, sources):
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


def _unmasked(
    graph: ir.Graph, division: ir.Equation, as_operator: bool = False
) -> _Unmasked | None:
    """What ends in a division; None of others.

    Args:
      graph: the traced model.
      division: the equation.
      as_operator: whether m may be of x before its axes are transposed, as `vmap` has it, and sums
        may be of another type of floats, as those of bfloat16 are.
    """
    if division.name != "div":
        return None
    numerator, denominator = division.inputs
    exponential = matching.producer(graph, numerator)
    if exponential is None or exponential.name != "exp":
        return None
    members = {division.index, exponential.index}
    total = through_movement(graph, denominator, members, with_casts=as_operator)
    if total is None or total.name != "reduce_sum":
        return None
    members.add(total.index)
    summed = total.inputs[0]
    if as_operator:
        for cast in matching.behind_casts(graph, summed):
            members.add(cast.index)
            summed = cast.inputs[0]
    if summed != numerator:
        return None
    # The maximum that is subtracted may be made in many ways: all that lies between it and the
    # source has to be made of maxima, stops of gradients and movements.
    shifted = matching.producer(graph, exponential.inputs[0])
    if shifted is None or shifted.name != "sub" or not isinstance(shifted.inputs[0], int):
        return None
    source, axes = shifted.inputs[0], tuple(total.params["axes"])
    members.add(shifted.index)
    sources = _before_moves(graph, source) if as_operator else {source}
    stack = [shifted.inputs[1]]
    while stack:
        atom = stack.pop()
        # Parameters may be subtracted as well: they cancel.
        if graph.is_static(atom) or atom in sources:
            continue
        eqn = matching.producer(graph, atom)
        is_moved = as_operator and eqn is not None and eqn.name == "transpose"
        if eqn is None or not (eqn.name in _OF_MAXIMA or is_moved):
            return None
        members.add(eqn.index)
        stack.extend(eqn.inputs)
    return _Unmasked(source, shifted.inputs[1], frozenset(members), axes)


# What leads from a tensor to the number that its softmax takes away.
_OF_MAXIMA = frozenset(
    {"reduce_max", "max", "stop_gradient", "broadcast_in_dim", "reshape", "select_n", "is_finite"}
)


def _before_moves(graph: ir.Graph, source: ir.Var) -> set[ir.Var]:
    """A tensor, and those of which it is a transpose."""
    found = {source}
    while (eqn := graph.producer.get(source)) is not None and eqn.name == "transpose":
        source = eqn.input_vars[0]
        found.add(source)
    return found


def _varying_axes(graph: ir.Graph, atom: ir.Atom, sources: set[ir.Var]) -> frozenset[int]:
    """The axes along which what is subtracted from one of `sources` may differ."""
    if isinstance(atom, int) and atom in sources:
        return frozenset(range(len(graph.shape(atom))))
    eqn = matching.producer(graph, atom)
    if eqn is None or graph.is_static(atom):
        return copies.varying_axes(graph, atom)
    of_operands = (_varying_axes(graph, x, sources) for x in eqn.inputs)
    # A maximum over an axis no longer differs along it: movements say where axes go.
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
        # A choice always replaces; a sum does so only where what is added is a mask.
        chooses = eqn.name == "select_n"  # then one value, -1e9 or -inf, is a mask too
        beside = [x for x in operands if x not in scores]
        if not chooses and not any(_masks(graph, x, scores) for x in beside):
            return source
        # The scores are the source only where nothing but the softmax reads the masked ones.
        only_here = all(user.index in members for user in graph.consumers.get(source, ()))
        if len(scores) != 1 or not isinstance(scores[0], int) or not only_here:
            return source
        # `mask - scores` turns them around, and is no mask of them.
        if source in graph.output_vars or (eqn.name == "sub" and scores[0] != eqn.inputs[0]):
            return source
        members.add(eqn.index)
        source = scores[0]
    return source


def _masks(graph: ir.Graph, atom: ir.Atom, scores: Sequence[ir.Atom]) -> bool:
    """False for what the epilogue of the product absorbs, so that no tensor is there before it.

    That is one value that is added everywhere, and one for each channel, as a layer's bias is.  An
    infinity it does not absorb.
    """
    if not graph.is_static(atom):
        return True
    varying = copies.varying_axes(graph, atom)
    channels = frozenset().union(*(_channels(graph, x) for x in scores))
    return bool(varying) and (_has_infinity(graph, atom) or not varying <= channels)


def _channels(graph: ir.Graph, atom: ir.Atom) -> frozenset[int]:
    """The axes of a weight's channels in its product, behind what is added to it."""
    eqn = matching.producer(graph, atom)
    # A bias before the mask does not hide the product.
    while eqn is not None and eqn.name in ("add", "sub"):
        others = [x for x in eqn.inputs if not graph.is_static(x)]
        eqn = matching.producer(graph, others[0]) if len(others) == 1 else None
    contraction = None if eqn is None else graph.contractions.get(eqn.index)
    if eqn is None or contraction is None or not contraction.is_dot:
        return frozenset()
    weights = [k for k in (0, 1) if graph.is_static(eqn.inputs[k])]
    return frozenset(contraction.result.free[weights[0]]) if len(weights) == 1 else frozenset()


def _has_infinity(graph: ir.Graph, atom: ir.Atom) -> bool:
    """True for a tensor of constants, one of which is infinite."""
    if isinstance(atom, ir.Literal):
        return bool(np.isinf(atom.value).any())
    values = [graph.constants[x] for x in graph.sources(atom) if x in graph.constants]
    # Of a model that is saved without weights only shapes are known.
    known = [x for x in values if not isinstance(x, jax.ShapeDtypeStruct)]
    floats = [x for x in known if jnp.issubdtype(x.dtype, jnp.floating)]
    return any(bool(np.isinf(np.asarray(x, np.float32)).any()) for x in floats)


def _is_mask(graph: ir.Graph, atom: ir.Atom) -> bool:
    """True for values that come from parameters, constants, and truth values or integers alone."""
    stack, steps = [atom], 0
    while stack:
        atom = stack.pop()
        # What is no float is a truth value or an index: the origin of a mask.
        if graph.is_static(atom) or not jnp.issubdtype(graph.dtype(atom), jnp.floating):
            continue
        # From booleans and integers, through shapes and arithmetic: no activation comes in.
        eqn, steps = matching.producer(graph, atom), steps + 1
        if eqn is None or steps > _MASK_STEPS:
            return False
        if not primitives.is_elementwise(eqn) and eqn.name not in _MASK_SHAPING:
            return False
        stack.extend(eqn.inputs)
    return True


_MASK_SHAPING = frozenset({"broadcast_in_dim", "reshape", "slice", "squeeze", "tile", "transpose"})
_MASK_STEPS = 32  # equations from truth values to a mask, at most


def through_movement(
    graph: ir.Graph, atom: ir.Atom, members: set[int], with_casts: bool = False
) -> ir.Equation | None:
    """What gives an operand, behind the equations that spread it, which join `members`."""

    def passes(eqn: ir.Equation) -> bool:
        spreads = eqn.name in ("broadcast_in_dim", "reshape", "stop_gradient")
        return spreads or (with_casts and matching.is_float_cast(graph, eqn))

    eqn = matching.producer(graph, atom)
    while eqn is not None and passes(eqn):
        members.add(eqn.index)
        eqn = matching.producer(graph, eqn.inputs[0])
    return eqn
