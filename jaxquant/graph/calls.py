"""Whether a function takes as many inputs as it is given: told before it is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class CallError(TypeError):
    """`apply_fn` takes another number of inputs than it is given; the message says what to do."""


class ModelError(ValueError):
    """What `apply_fn` does in the call, or lacks; the message says what to pass instead."""


_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def check_call(apply_fn: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """Raise CallError where `apply_fn(params, *inputs)` has too many arguments, or lacks some.

    >>> check_call(lambda params, x, train: x, (jnp.ones((2, 3)),))
    Traceback (most recent call last):
        ...
    jaxquant.graph.calls.CallError: apply_fn(params, x, train) is called with its parameters and \
1 input, \
float32[2, 3]; `train` must be an input too, or be fixed around the function: \
`lambda p, x: apply_fn(p, x, train=...)`
    """
    # A C function, say: then tracing itself tells.
    signature = _signature(apply_fn)
    if signature is None:
        return
    # `bind` knows Python's rules of arguments better than a count would.
    try:
        signature.bind(None, *inputs)
    except TypeError:
        raise CallError(_difference(signature, inputs)) from None


def shapes_text(inputs: Any) -> str:
    """The dtypes and shapes of a pytree of inputs.

    >>> shapes_text((jnp.ones((2, 3)), {"mask": jnp.ones(2, bool)}))
    "float32[2, 3], {'mask': bool[2]}"
    """
    shown = jax.tree.map(lambda x: _Shown(f"{jnp.result_type(x)}{list(np.shape(x))}"), inputs)
    return ", ".join(map(repr, shown)) if isinstance(shown, tuple) else repr(shown)


class _Shown(str):
    """Text that stands without quotes in the repr of what holds it."""

    def __repr__(self) -> str:
        return str(self)


def _signature(apply_fn: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function; None where Python does not know it."""
    try:
        signature = inspect.signature(apply_fn)
        module = getattr(apply_fn, "__self__", None)
        if not _is_linen_apply(apply_fn, module):
            return signature
        # linen's `apply` takes anything and hands it on to the module's `__call__`.
        variables, *_ = signature.parameters.values()
        _, *taken = inspect.signature(type(module).__call__).parameters.values()
    except (TypeError, ValueError):
        return None
    return inspect.Signature([variables.replace(kind=_BY_POSITION[0]), *taken])


def _is_linen_apply(apply_fn: Any, module: Any) -> bool:
    package = next((c.__module__ for c in type(module).__mro__ if c.__name__ == "Module"), "")
    return package.startswith("flax.linen") and apply_fn.__name__ == "apply"


def _difference(signature: inspect.Signature, inputs: Sequence[Any]) -> str:
    """What a call has too much, or lacks."""
    parameters = signature.parameters.values()
    count = f"{len(inputs)} input{'' if len(inputs) == 1 else 's'}"
    said = (
        f"apply_fn({', '.join(signature.parameters)}) is called with its parameters and {count}, "
        f"{shapes_text(tuple(inputs))}"
    )

    # The first parameter is that of the parameters.
    taken = sum(p.kind in _BY_POSITION for p in parameters) - 1
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if by_name and taken + len(by_name) == len(inputs):
        placed = list(signature.parameters)[: 1 + taken]
        handed = ", ".join([*placed, *(f"{name}={name}" for name in by_name)])
        return (
            f"{said}, by their places: "
            f"`lambda {', '.join([*placed, *by_name])}: apply_fn({handed})`"
        )
    # What Flax's users write first: a bound method that takes the inputs alone.
    if taken < 1:
        return f"{said}: it is a function of both, as in `lambda p, x: model.apply(p, x)`"
    if len(inputs) > taken and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return f"{said}; leave out what it does not take, as labels"
    # Positional parameters left over without a default: an input is missing, or a flag.
    given = list(signature.parameters)[: 1 + len(inputs)]
    own = ", ".join(["p", *given[1:]])
    lacking = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in given and p.kind is not p.VAR_KEYWORD
    ]
    named = " and ".join(f"`{name}`" for name in lacking)
    fixed = ", ".join(f"{name}=..." for name in lacking)
    return (
        f"{said}; {named} must be an input too, or be fixed around the function: "
        f"`lambda {own}: apply_fn({own}, {fixed})`"
    )
