"""Which equations compute the same of operands of the same shapes and dtypes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxquant.graph import ir
from jaxquant.jax_shim import jaxprs

# Rules for derivatives and batching, which nobody asks for where equations are only evaluated.
_UNREAD = frozenset({"rule", "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd"})


def number_alike(equations: Iterable[ir.Equation]) -> dict[int, int]:
    """The index of each equation -> a number that all have that compute the same.

    Equations have one number where primitive, parameters and literals are equal, whichever tensors
    they read.  A number stands for what is large to compare, so that it is compared once.
    """
    numbers: dict[Hashable, int] = {}
    # Keys are large (whole bodies); what is compared often are their numbers.
    return {eqn.index: numbers.setdefault(_equation_key(eqn), len(numbers)) for eqn in equations}


def _equation_key(eqn: ir.Equation) -> Hashable:
    literals = [_literal_key(x) if isinstance(x, ir.Literal) else None for x in eqn.inputs]
    return (eqn.name, _params_key(eqn.params), tuple(literals))


def _literal_key(literal: ir.Literal) -> Hashable:
    return ("literal", literal.value.dtype.name, literal.value.tobytes())


def _params_key(params: Mapping[str, Any]) -> Hashable:
    """Equal for equations of one primitive that compute the same."""
    return _key({name: value for name, value in params.items() if name not in _UNREAD})


def _key(value: Any) -> Hashable:
    """Equal for values that mean the same; of functions, for one alone."""
    if isinstance(value, jaxprs.ClosedJaxpr):
        return (_jaxpr_key(value.jaxpr), tuple(map(_key, value.consts)))
    if isinstance(value, jaxprs.Jaxpr):
        return _jaxpr_key(value)
    if isinstance(value, Mapping):
        return tuple(sorted((str(name), _key(each)) for name, each in value.items()))
    # Exactly these types: a named tuple is a tuple too, and means what its type says.
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return tuple(map(_key, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return (value.shape, value.dtype.name, value.tobytes())
    # A function is equal to itself alone: what another one does cannot be told.
    return value if isinstance(value, Hashable) else id(value)


def _jaxpr_key(jaxpr: Any) -> Hashable:
    # Variables are numbered where they are first met, so that names do not matter.
    local: dict[Any, int] = {}

    def place(atom: Any) -> Hashable:
        if isinstance(atom, jaxprs.Literal):
            return ("literal", str(atom.aval), _key(np.asarray(atom.val)))
        return local.setdefault(atom, len(local))

    for var in (*jaxpr.constvars, *jaxpr.invars):
        place(var)
    lines = []
    for eqn in jaxpr.eqns:
        operands = tuple(place(x) for x in eqn.invars)
        params = _params_key(eqn.params)
        results = tuple(place(x) for x in eqn.outvars)
        lines.append((eqn.primitive.name, params, operands, results))
    # Types of what a body takes are not in its equations.
    avals = tuple(str(var.aval) for var in (*jaxpr.constvars, *jaxpr.invars))
    return (tuple(lines), avals, tuple(place(x) for x in jaxpr.outvars))
