"""Constants beside activations: what a concatenation or a padding puts next to what it moves.

A class token, the zeros of a causal shift, the state that a convolution starts from.  In int8 they
lie on the scale of the result, so that scale has to hold them; an infinity has no integer.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.sites import Site

_MAXIMA = frozenset({"reduce_max", "reduce_window_max"})
_MINIMA = frozenset({"reduce_min", "reduce_window_min"})


def constants_of(graph: ir.Graph, site: Site) -> dict[str, ir.Var]:
    """The constants that a site puts beside activations, by the names of their statistics.

    They lie on the scale of the result, which has to hold them.  Padding with zero is none: every
    grid holds it.
    """
    eqn = graph.equations[site.equation]
    if not kinds.is_join(eqn) and not _is_padding(graph, eqn):
        return {}
    return {
        f"{site.name}/constant_{position}": atom
        for position, atom in enumerate(eqn.inputs)
        if isinstance(atom, int)
        and graph.static[atom]
        # Padding with zero needs no room on the scale.
        and (eqn.name != "pad" or primitives.constant_scalar(graph, atom) != 0)
    }


def takes_constants(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """False where an equation puts constants beside its operands that no int8 grid holds.

    -inf, or the least number of the type, is what a maximum takes for nothing, and does not have to
    be told from the least integer there.  In a concatenation an infinity stands for itself.
    """
    if not has_infinity(graph, eqn):
        # Literals are in no statistics, so that only zeros may be among them.
        literals = [x for x in _beside(graph, eqn) if isinstance(x, ir.Literal)]
        return not any(x.value.any() for x in literals)  # no statistics tell the grid of these
    value = primitives.constant_scalar(graph, eqn.inputs[1]) if eqn.name == "pad" else None
    if value is None:
        return False
    # A negative infinity is nothing to a maximum, a positive one to a minimum.
    pools = _MAXIMA if value < 0 else _MINIMA
    users = graph.consumers.get(eqn.outputs[0], ())

    # An output shows the padding itself, whoever else reads it.
    return eqn.outputs[0] not in graph.output_vars and all(user.name in pools for user in users)


def has_infinity(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where what is padded or joined with is an infinity, or the largest number there is."""
    atoms = _beside(graph, eqn)
    if not atoms:
        return False
    values = [primitives.constant_scalar(graph, atom) for atom in atoms]
    # The least number of a type stands for an infinity: `jnp.finfo(...).min` in place of -inf.
    largest = float(jnp.finfo(graph.dtype(eqn.outputs[0])).max)
    return any(value is not None and abs(value) >= largest for value in values)


def _beside(graph: ir.Graph, eqn: ir.Equation) -> tuple[ir.Atom, ...]:
    """What a padding or concatenation of floats may have of constants."""
    if _is_padding(graph, eqn):
        return eqn.inputs[1:]
    return eqn.inputs if kinds.is_join(eqn) and _is_float(graph, eqn) else ()


def _is_padding(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for a float that is padded with a constant."""
    return eqn.name == "pad" and _is_float(graph, eqn) and graph.is_static(eqn.inputs[1])


def _is_float(graph: ir.Graph, eqn: ir.Equation) -> bool:
    return bool(jnp.issubdtype(graph.dtype(eqn.outputs[0]), jnp.floating))
