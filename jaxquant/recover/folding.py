"""Where a tensor's channels are divided without any cost in the call: in parameters before it.

What a normalisation scales and shifts, or a linear layer gives, is divided by dividing those
parameters; so is what ReLU, casts and movements make of it.  Each parameter must be read nowhere
else, and each tensor on the way too, so that nothing else is divided.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxquant.graph import ir, matching, primitives
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site

_SAME = ("copy", "copy_p", "stop_gradient", "reduce_precision", *primitives.PLACEMENTS)
_MOVED = ("reshape", "squeeze", "expand_dims")


class Place(NamedTuple):
    """An axis of a parameter that runs along the channels of a tensor."""

    leaf: ir.Var
    axis: int


def dividing(model: Model, var: ir.Var, axis: int, readers: Collection[int]) -> list[Place] | None:
    """The parameters that are divided so that a tensor is, along one of its axes.

    Args:
      model: a whole model.
      var: the tensor.
      axis: its channels.
      readers: the indices of the equations that read it, all of which take the division back.

    Returns:
      None where it cannot be divided so.
    """
    graph = model.graph
    # Whoever else reads it would read a divided tensor.
    read_by = {eqn.index for eqn in graph.consumers.get(var, ())}
    if var in graph.output_vars or not read_by <= set(readers):
        return None
    # A loop's sites have no tensors here, and share weights over steps.
    sites = {site.equation: site for site in model.sites if not site.inside}
    return _divided(graph, sites, var, axis)


def place_of(graph: ir.Graph, atom: ir.Atom, axis: int) -> Place | None:
    """Where an axis of a static tensor is in the float32 parameter that it is, rearranged; or None.

    The parameter has no other reader.
    """
    while isinstance(atom, int) and atom not in graph.leaves:
        eqn = graph.producer.get(atom)
        found = None if eqn is None or not is_alone(graph, atom) else _before(graph, eqn, axis)
        if eqn is None or found is None:
            return None
        atom, axis = eqn.inputs[0], found
    # A parameter with another reader, its penalty say, would be divided for that too.
    if not isinstance(atom, int) or not is_alone(graph, atom):
        return None
    return Place(atom, axis) if graph.dtype(atom) == jnp.float32 else None


def _divided(
    graph: ir.Graph, sites: dict[int, Site], var: ir.Atom, axis: int
) -> list[Place] | None:
    """What is divided so that a tensor with one reader, or one whose readers are known, is."""

    # A constant beside the channels is divided itself, where it is a parameter.
    if graph.is_static(var):
        place = place_of(graph, var, axis)
        return None if place is None else [place]
    assert isinstance(var, int)
    eqn = graph.producer.get(var)
    if eqn is None:
        return None
    # Back from the tensor to what can take the factors in: a weight, a bias, parameters of a norm.
    if (site := sites.get(eqn.index)) is not None and site.contraction is not None:
        return _divided_weight(graph, site, axis)
    inner = [x for x in eqn.inputs if isinstance(x, int) and (graph.is_static(x) or
             is_alone(graph, x))]  # fmt: skip
    # A sum is divided where every part is; a product where one factor is.
    if eqn.name in ("add", "add_any", "sub"):
        parts = [_spread(graph, sites, x, var, axis) if x in inner else None for x in eqn.inputs]
        if any(part is None for part in parts):
            return None
        return [place for part in parts if part for place in part]
    if eqn.name == "mul":
        tried = (_spread(graph, sites, x, var, axis) for x in eqn.inputs if x in inner)
        # One factor is enough, the first that can be divided.
        return next((part for part in tried if part is not None), None)
    # ReLU(x / s) = ReLU(x) / s for s > 0; other activations do not let factors through.
    if eqn.name == "div" or primitives.is_relu(eqn):
        first = next((x for x in eqn.inputs if isinstance(x, int)), None)
        is_first = first is not None and first == eqn.inputs[0] and first in inner
        return _spread(graph, sites, first, var, axis) if is_first and first is not None else None
    before = _before(graph, eqn, axis) if len(inner) == 1 == len(eqn.inputs) else None
    return None if before is None else _divided(graph, sites, inner[0], before)


def _spread(
    graph: ir.Graph, sites: dict[int, Site], atom: ir.Atom, result: ir.Var, axis: int
) -> list[Place] | None:
    """The same of an operand of an elementwise equation, which has all its channels."""
    shape, wanted = graph.shape(atom), graph.shape(result)
    # What is broadcast along the channels has one number for all of them.
    if len(shape) != len(wanted) or shape[axis] != wanted[axis]:
        return None
    return _divided(graph, sites, atom, axis)


def _divided_weight(graph: ir.Graph, site: Site, axis: int) -> list[Place] | None:
    """The weight of a linear layer, along the output channels that are one axis of its result."""
    contraction, side = site.as_contraction, site.weight_position
    if site.stored_weight is None or contraction.choosing is not None or contraction.has_batch:
        return None
    own = [a for a in site.weight_axes.free if contraction.place(side, a) == axis]
    place = place_of(graph, site.stored_weight, own[0]) if len(own) == 1 else None
    return None if place is None else [place]


def is_alone(graph: ir.Graph, var: ir.Var) -> bool:
    """Whether a tensor has one reader, and that once."""
    readers = graph.consumers.get(var, ())
    # x * x reads a tensor once as an equation, twice as a factor.
    return len(readers) == 1 and readers[0].inputs.count(var) == 1 and var not in graph.output_vars


def _before(graph: ir.Graph, eqn: ir.Equation, axis: int) -> int | None:
    """Where an axis of the result of a movement or a cast is in its operand."""
    before, after = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0])
    if eqn.name in _SAME or matching.is_float_cast(graph, eqn):  # one to integers rounds
        return axis
    if eqn.name == "transpose":
        return int(eqn.params["permutation"][axis])
    if eqn.name == "broadcast_in_dim":
        places = eqn.params["broadcast_dimensions"]
        own = [n for n, place in enumerate(places) if place == axis]
        return own[0] if own and before[own[0]] == after[axis] else None
    return _unmoved(before, after, axis) if eqn.name in _MOVED else None


def _unmoved(before: Sequence[int], after: Sequence[int], axis: int) -> int | None:
    """The axis of the same size with as many elements behind it, before a reshape."""
    # The same place counted from the end is the same place, whatever is before it.
    behind = math.prod(after[axis + 1 :])
    found = [
        n
        for n, size in enumerate(before)
        if size == after[axis] and math.prod(before[n + 1 :]) == behind
    ]
    return found[0] if len(found) == 1 else None
