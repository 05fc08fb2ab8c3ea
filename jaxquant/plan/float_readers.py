"""Which float equations may read the int8 form of what they read."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from jaxquant.graph import ir, kinds, primitives
from jaxquant.plan.candidates import in_skip_scope

# Elementwise functions that magnify an absolute error without bound: they read floats.
_SINGULAR = frozenset(
    {"acosh", "atanh", "erf_inv", "integer_pow", "log", "log1p", "log2", "polynomial", "pow"}
    | {"rem", "rsqrt", "tan"}
)


def may_read_int8(
    graph: ir.Graph, eqn: ir.Equation, int8: Collection[ir.Var], barred: Collection[int]
) -> bool:
    """False under the skip scope, and where a value rounded to zero gives infinity.

    Args:
      graph: the graph.
      eqn: an equation of it.
      int8: the tensors with an int8 form.
      barred: see `jaxquant.plan.form_search.find_forms`.
    """
    # A divisor may be rounded to zero, and the quotient is infinite then.
    rounded = eqn.name == "div" and any(v in int8 for v in _vars(eqn.inputs[1:]))
    if rounded or eqn.name in _SINGULAR or in_skip_scope(eqn.scope):
        return False
    return not any(_is_float_join(graph, var, barred) for var in eqn.input_vars)


def _is_float_join(graph: ir.Graph, var: ir.Var, barred: Collection[int]) -> bool:
    """True for what a barred concatenation gives: it is there in float, with all its parts."""
    eqn = graph.producer.get(primitives.movement_root(graph, var))
    return eqn is not None and kinds.is_join(eqn) and eqn.index in barred


def _vars(atoms: Sequence[ir.Atom]) -> tuple[ir.Var, ...]:
    return tuple(x for x in atoms if isinstance(x, int))
