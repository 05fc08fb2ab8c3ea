"""The only module that touches JAX internals.

Everything else in the package sees JAX through its public API and through the names below, so a
new JAX release is absorbed here.  Checked on jax 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core as jex_core

ClosedJaxpr = jex_core.ClosedJaxpr
Jaxpr = jex_core.Jaxpr
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal
Primitive = jex_core.Primitive

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


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of the operands of a `scan` are constants, and how many are its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12: three trees
    return len(list(consts)), len(list(carry))


def _open(body: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    if isinstance(body, ClosedJaxpr):
        return body.jaxpr, body.consts
    return body, ()


def scope_of(eqn: JaxprEqn) -> str:
    """The name stack of an equation (relative to the call that holds it), joined with '/'."""
    return str(eqn.source_info.name_stack)


def dtype_of(literal: Literal) -> Any:
    """The dtype of a literal of a jaxpr."""
    return literal.aval.dtype  # type: ignore[attr-defined]


def is_key_dtype(dtype: Any) -> bool:
    """True for the dtype of PRNG keys, which has no NumPy counterpart."""
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended)


def bind(primitive: Primitive, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Apply a primitive to operands; returns the list of its results."""
    bound = primitive.get_bind_params(dict(params))
    if isinstance(bound, tuple):  # up to jax 0.9 a pair (functions, params)
        subfuns, bound = bound
        results = primitive.bind(*subfuns, *operands, **bound)
    else:
        results = primitive.bind(*_match_varying(operands), **bound)
    return list(results) if primitive.multiple_results else [results]


def _match_varying(operands: Sequence[Any]) -> Sequence[Any]:
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


@contextlib.contextmanager
def without_source_locations() -> Iterator[None]:
    """Programs that are lowered inside do not name the source files that they came from."""
    name = "jax_traceback_in_locations_limit"
    known = getattr(jax.config, name, None)
    if known is None:
        yield
        return
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, known)
