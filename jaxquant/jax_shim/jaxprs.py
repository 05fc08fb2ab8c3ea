"""Jaxprs as JAX records them: their equations, their bodies, and how to apply an equation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import source_info_util
from jax.extend import core as jex_core

ClosedJaxpr = jex_core.ClosedJaxpr
Jaxpr = jex_core.Jaxpr
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal
Primitive = jex_core.Primitive
jaxpr_as_fun = jex_core.jaxpr_as_fun
# The place of an equation: its number in a jaxpr, behind those of the calls around it.
Place = tuple[int, ...]

# Calls whose body is evaluated in place: primitive name -> the parameter that holds the body.
_INLINED_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


def inlined_body(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """The body of a call that can be evaluated in place, as (jaxpr, consts); None otherwise."""
    key = _INLINED_CALLS.get(eqn.primitive.name)
    if key is None or key not in eqn.params:
        return None
    return _open(eqn.params[key])


def inlined_calls() -> frozenset[str]:
    """The names of the primitives whose bodies are evaluated in place."""
    return frozenset(_INLINED_CALLS)


def has_custom_derivative(eqn: JaxprEqn) -> bool:
    """True for the call of a function with its own derivative rule."""
    return eqn.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call"))


def sub_bodies(params: dict[str, Any]) -> list[tuple[str, Jaxpr, Sequence[Any]]]:
    """Every jaxpr in an equation's parameters, as (parameter name, jaxpr, consts)."""
    found = []
    for key, value in params.items():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                found.append((key, *_open(item)))
    return found


def looked_up(name: str, params: Mapping[str, Any]) -> frozenset[int]:
    """The operands of an equation that its bodies look rows up in: matrices, the same in all steps.

    Args:
      name, params: of a loop, a choice or a call; of another equation there is none.
    """
    found: set[int] = set()
    for key, body, _ in sub_bodies(dict(params)):
        # The body's arguments begin with that operand of the equation.
        first = 0
        if name == "cond":
            first = 1
        elif name == "while" and key == "body_jaxpr":
            first = params["cond_nconsts"]
        found.update(first + place for place in _looked_up_in(body))
    return frozenset(found)


def _looked_up_in(body: Jaxpr) -> frozenset[int]:
    """The places of the arguments of a body that rows are looked up in."""
    tables: set[Any] = set()
    for eqn in body.eqns:
        matrix = eqn.invars[0] if eqn.primitive.name == "gather" else None
        # Rows are looked up where a slice is one entry of the first axis and all of the others.
        if matrix is not None and tuple(eqn.params["slice_sizes"]) == (1, *shape_of(matrix)[1:]):
            tables.add(matrix)
        inside = [eqn.invars[place] for place in looked_up(eqn.primitive.name, eqn.params)]
        tables.update(x for x in inside if not isinstance(x, Literal))
    return frozenset(place for place, var in enumerate(body.invars) if var in tables)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a `scan` are constants, and how many are its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12: three trees
    return len(list(consts)), len(list(carry))


def portable_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a primitive as every release of JAX can be told them.

    A `scan` has "num_consts" and "num_carry", as up to jax 0.11; jax 0.12 has trees instead.
    """
    if name != "scan":
        return dict(params)
    consts, carry = scan_counts(params)
    others = {key: value for key, value in params.items() if key not in ("ft_in", "ft_out")}
    return others | {"num_consts": consts, "num_carry": carry}


def own_params(name: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that this JAX has, of those that `portable_params` gives."""
    own = dict(params)
    if name == "scan" and _scan_has_trees():
        from jax._src import flattree  # type: ignore[attr-defined]  # jax 0.12 has it

        counts = own.pop("num_consts"), own.pop("num_carry")
        read = len(own["jaxpr"].in_avals) - sum(counts)
        written = len(own["jaxpr"].out_avals) - counts[1]
        own["ft_in"] = flattree.pack(tuple(map(flattree.nones, (*counts, read))))
        own["ft_out"] = flattree.pack(tuple(map(flattree.nones, (counts[1], written))))
    return own


@functools.cache
def _scan_has_trees() -> bool:
    # Found by trying: what decides is the record, not the version.
    def scan(xs: jax.Array) -> Any:
        return jax.lax.scan(lambda carry, x: (carry, x), 0, xs)

    (eqn,) = jax.make_jaxpr(scan)(jax.ShapeDtypeStruct((1,), "int32")).jaxpr.eqns
    return "ft_in" in eqn.params


def _open(body: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    if isinstance(body, ClosedJaxpr):
        return body.jaxpr, body.consts
    return body, ()


def scope_of(eqn: JaxprEqn) -> str:
    """The name stack of an equation (relative to the call that holds it), joined with '/'."""
    return str(eqn.source_info.name_stack)


def line_of(source_info: Any) -> str:
    """The line of the user's code that an equation comes from, as "file.py:12"; "" if not known."""
    summary = "" if source_info is None else source_info_util.summarize(source_info)
    found = _LINE.search(summary)
    return f"{found[1]}:{found[2]}" if found else ""


_LINE = re.compile(r"([^/\\]+?):(\d+)(?::\d+)? \(")  # of "/folder/file.py:12:4 (function)"


def dtype_of(atom: Any) -> Any:
    """The dtype of a variable or literal of a jaxpr."""
    return atom.aval.dtype


def shape_of(atom: Any) -> tuple[int, ...]:
    """The shape of a variable or literal of a jaxpr."""
    return tuple(atom.aval.shape)


def bind(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Apply a primitive to operands; returns the list of its results."""
    bound = primitive.get_bind_params(dict(params))
    if isinstance(bound, tuple):  # up to jax 0.9 a pair (functions, params)
        subfuns, bound = bound
        results = primitive.bind(*subfuns, *operands, **bound)
    else:
        results = primitive.bind(*match_varying(operands), **bound)
    return list(results) if primitive.multiple_results else [results]


def interpret(
    jaxpr: Jaxpr,
    consts: Sequence[Any],
    args: Sequence[Any],
    apply: Callable[[JaxprEqn, Place, list[Any]], Sequence[Any]],
    enters: Callable[[JaxprEqn, Place], bool],
    place: Place = (),
) -> list[Any]:
    """Evaluate a jaxpr by a function of one's own; equations that are traced keep their scopes.

    Args:
      jaxpr, consts, args: what is evaluated; values are of any type that `apply` takes.
      apply: gives the results of an equation.
      enters: whether a call is evaluated equation by equation; of those with `inlined_body`.
      place: of the call that is evaluated.
    """
    env: dict[Any, Any] = {
        **dict(zip(jaxpr.constvars, consts, strict=True)),
        **dict(zip(jaxpr.invars, args, strict=True)),
    }

    def read(atom: Any) -> Any:
        # A literal has its dtype apart: 1 is an int in Python and may be a bfloat16 here.
        if isinstance(atom, Literal):
            return np.asarray(atom.val, dtype=dtype_of(atom))
        return env[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        operands, here = [read(x) for x in eqn.invars], (*place, number)
        # Scopes are kept, since sites are named after them in the new trace too.
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack):
            body = inlined_body(eqn)
            if body is not None and enters(eqn, here):
                results: Sequence[Any] = interpret(*body, operands, apply, enters, here)
            else:
                results = apply(eqn, here, operands)
        env.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def match_varying(operands: Sequence[Any]) -> Sequence[Any]:
    """Inside `shard_map`, mark replicated operands as varying where another operand varies.

    `jax.lax` functions do this before they bind; a recorded equation has to repeat it.
    """
    varying = [_varying_axes(x) for x in operands]
    union: frozenset[Any] = frozenset().union(*varying)
    if not union:
        return operands
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def _varying_axes(x: Any) -> frozenset[Any]:
    """The axes of the mesh, inside `shard_map`, along which a value varies."""
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return frozenset(aval.manual_axis_type.varying)
    return getattr(aval, "vma", frozenset())
