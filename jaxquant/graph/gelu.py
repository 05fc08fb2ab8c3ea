"""GELU, recognized by what it gives.

JAX, Flax and users write it in many ways, such as `0.5 x erfc(-x / sqrt 2)` and
`x (1 + erf(x / sqrt 2)) / 2`, with `x ** 3` or `x * x * x` in the tanh form.  An elementwise
function of one tensor that gives what GELU gives is GELU, so that it is evaluated and compared.
Source of both forms: Hendrycks and Gimpel, arXiv:1606.08415.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir, matching, primitives
from jaxquant.jax_shim import jaxprs

_MOST_EQUATIONS = 16  # of one GELU
_HINTS = {"erf": "none", "erfc": "none", "tanh": "tanh"}  # which of the two forms it may be
_POINTS = np.concatenate([np.linspace(-12, 12, 481), [-1e3, 1e3, 0.1, -0.3]]).astype(np.float32)


def match(graph: ir.Graph, last: ir.Equation) -> matching.Match | None:
    """The GELU that ends in an equation; None of others."""
    # Both forms end in a product, or in a quotient by 2.
    if last.name not in ("mul", "div") or graph.static[last.outputs[0]]:
        return None
    # A cheap look first: tanh or erf close by, and only one of the two.
    near = list(_behind(graph, last))
    forms = {_HINTS[eqn.name] for eqn in near if eqn.name in _HINTS}
    if len(forms) != 1:
        return None
    (form,) = forms
    # Every tensor nearby may be the argument; a candidate is proved by evaluating it on numbers.
    for source in dict.fromkeys(v for eqn in near for v in eqn.input_vars):
        # A function of one tensor alone, and with tanh or erf in it.
        members = _between(graph, source, last)
        if members is None or not any(graph.equations[i].name in _HINTS for i in members):
            continue
        if matching.is_private(graph, members, last.outputs[0]) and _is_gelu(
            graph, source, last, members, form
        ):
            return matching.Match((source,), frozenset(members), {"approximate": form})
    return None


def _behind(graph: ir.Graph, last: ir.Equation) -> Iterator[ir.Equation]:
    """Elementwise equations that lead to the last one, the nearest first; not too many."""
    queue, seen = [last], {last.index}
    while queue and len(seen) <= _MOST_EQUATIONS:
        eqn = queue.pop(0)
        yield eqn
        for var in eqn.input_vars:
            before = graph.producer.get(var)
            # Static values are the numbers of the formula, not what it is computed of.
            if before is None or before.index in seen or graph.static[var]:
                continue
            if primitives.is_elementwise(before) and len(before.outputs) == 1:
                seen.add(before.index)
                queue.append(before)


def _between(graph: ir.Graph, source: ir.Var, last: ir.Equation) -> set[int] | None:
    """The equations from a tensor to the last one, if they read that tensor and numbers alone."""
    members, stack = {last.index}, list(last.inputs)
    while stack:
        atom = stack.pop()
        # Whatever else it reads would make it another function.
        if atom == source or matching.spread_number(graph, atom) is not None:
            continue
        eqn = matching.producer(graph, atom)
        if eqn is None or not primitives.is_elementwise(eqn) or len(members) == _MOST_EQUATIONS:
            return None
        if eqn.index not in members:
            members.add(eqn.index)
            stack.extend(eqn.inputs)
    return members


def _is_gelu(
    graph: ir.Graph, source: ir.Var, last: ir.Equation, members: set[int], form: str
) -> bool:
    """Whether equations give GELU of a tensor, up to rounding."""
    if not jnp.issubdtype(graph.dtype(source), jnp.floating):
        return False
    # Whoever asks may be tracing; these are numbers.
    with jax.ensure_compile_time_eval():
        found = np.asarray(_evaluated(graph, source, last, members))
        expected = np.asarray(jax.nn.gelu(jnp.asarray(_POINTS), approximate=form == "tanh"))
    # Its numbers, such as 1 / sqrt 2, are rounded in the model's dtype.
    rounding = 1e-5 + float(jnp.finfo(graph.dtype(source)).eps)
    return bool(np.all(np.abs(found - expected) <= rounding * np.maximum(1, np.abs(_POINTS))))


def _evaluated(graph: ir.Graph, source: ir.Var, last: ir.Equation, members: set[int]) -> jax.Array:
    """What equations give for `_POINTS`, in float32 whatever the model's dtype."""
    values: dict[ir.Var, jax.Array] = {source: jnp.asarray(_POINTS)}

    def operand(atom: ir.Atom) -> jax.Array:
        if isinstance(atom, int) and atom in values:
            return values[atom]
        number = matching.spread_number(graph, atom)
        assert number is not None, "members read the source, each other and numbers"
        return jnp.full(_POINTS.shape, number, jnp.float32)

    # By its values, since a GELU is written in a dozen ways: the order of factors, casts, powers.
    for eqn in (graph.equations[index] for index in sorted(members)):
        operands = [operand(x) for x in eqn.inputs]
        if matching.is_float_cast(graph, eqn):
            values[eqn.outputs[0]] = operands[0]
        else:
            (values[eqn.outputs[0]],) = jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
    return values[last.outputs[0]]
