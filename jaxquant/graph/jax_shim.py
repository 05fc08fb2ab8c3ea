"""The only module that touches JAX internals.

Everything else in the package sees JAX through its public API and through the names below, so a
new JAX release is absorbed here.  Checked on jax 0.10.2 and 0.12.0.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import dispatch, distributed, source_info_util
from jax._src.export import _export
from jax.extend import core as jex_core
from jax.interpreters import batching, mlir

ClosedJaxpr = jex_core.ClosedJaxpr
Jaxpr = jex_core.Jaxpr
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal
Primitive = jex_core.Primitive
jaxpr_as_fun = jex_core.jaxpr_as_fun

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


def line_of(source_info: Any) -> str:
    """The line of the user's code that an equation comes from, as "file.py:12"; "" if not known."""
    summary = "" if source_info is None else source_info_util.summarize(source_info)
    found = _LINE.search(summary)
    return f"{found[1]}:{found[2]}" if found else ""


_LINE = re.compile(r"([^/\\]+?):(\d+)(?::\d+)? \(")  # of "/folder/file.py:12:4 (function)"


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
        results = primitive.bind(*match_varying(operands), **bound)
    return list(results) if primitive.multiple_results else [results]


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


# A computation with two forms, of which one is traced when it is lowered.
_choice = Primitive("jaxquant_choice")
_choice.multiple_results = True


def choose_by_platform(
    native: Callable[..., Sequence[Any]],
    portable: Callable[..., Sequence[Any]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
) -> list[Any]:
    """`native(*operands)` where it is compiled for this process's CPU, else `portable(*operands)`.

    Both give a list of arrays like `outputs`.  An export is portable.
    """
    return _choose(_is_native, (native, portable), outputs, operands)


def choose_by_devices(
    one: Callable[..., Sequence[Any]],
    several: Callable[..., Sequence[Any]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
) -> list[Any]:
    """`several(*operands)` where it is compiled for known devices, more than one; else `one`.

    Both give a list of arrays like `outputs`.
    """
    return _choose(_is_one_device, (one, several), outputs, operands)


def choose_on_one_cpu(
    native: Callable[..., Sequence[Any]],
    portable: Callable[..., Sequence[Any]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
) -> list[Any]:
    """`native(*operands)` where it is compiled for this process's one CPU device.

    Else `portable(*operands)`: on other devices, sharded, exported.
    """

    def on_cpu(*operands: Any) -> Sequence[Any]:
        return choose_by_devices(native, portable, outputs, operands)

    return choose_by_platform(on_cpu, portable, outputs, operands)


def _is_native(ctx: Any, on_cpu: bool) -> bool:
    return on_cpu and not ctx.module_context.lowering_parameters.for_export


def _is_one_device(ctx: Any, on_cpu: bool) -> bool:
    context = ctx.module_context.axis_context
    if hasattr(context, "device_assignment"):
        return context.device_assignment is None or len(context.device_assignment) == 1
    return False


def _choose(
    is_first: Callable[..., bool],
    forms: tuple[Callable[..., Sequence[Any]], Callable[..., Sequence[Any]]],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
) -> list[Any]:
    shapes = tuple((tuple(s.shape), s.dtype) for s in outputs)
    operands = match_varying(operands)
    return list(_choice.bind(*operands, is_first=is_first, forms=forms, shapes=shapes))


def _choice_avals(*avals: Any, shapes: Any, **_: Any) -> list[Any]:
    """The outputs vary, inside `shard_map`, where the operands do: those vary alike."""
    like = avals[0]
    return [
        like.update(
            shape=shape,
            dtype=dtype,
            weak_type=False,
            sharding=like.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape))),
        )
        for shape, dtype in shapes
    ]


def _choice_lowering(
    ctx: Any, *operands: Any, is_first: Any, forms: Any, on_cpu: bool = False, **_: Any
) -> Any:
    chosen = forms[0] if is_first(ctx, on_cpu) else forms[1]
    return mlir.lower_fun(lambda *xs: list(chosen(*xs)), multiple_results=True)(ctx, *operands)


def _choice_batching(
    operands: Sequence[Any], axes: Sequence[Any], *, forms: Any, shapes: Any, **params: Any
) -> tuple[list[Any], list[int]]:
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    results = _choice.bind(
        *operands,
        forms=tuple(jax.vmap(form, tuple(axes)) for form in forms),
        shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
        **params,
    )
    return list(results), [0] * len(shapes)


_choice.def_abstract_eval(_choice_avals)
_choice.def_impl(lambda *xs, **params: jax.jit(lambda *ys: _choice.bind(*ys, **params))(*xs))
batching.primitive_batchers[_choice] = _choice_batching
mlir.register_lowering(_choice, _choice_lowering)
mlir.register_lowering(_choice, functools.partial(_choice_lowering, on_cpu=True), platform="cpu")
# Else a lowering does not learn of the devices, one or several, that it is for.
dispatch.prim_requires_devices_during_lowering.add(_choice)


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


def missing_processes(name: str, seconds: float) -> list[int]:
    """Wait until every process has come here; returns those that did not within `seconds`.

    Args:
      name: the same in every process, and another for each meeting.
      seconds: how long to wait for all of them together.
    """
    client = distributed.global_state.client
    if client is None:
        return []
    client.key_value_set(f"{name}/{jax.process_index()}", "here")
    end, missing = time.monotonic() + seconds, []
    for index in range(jax.process_count()):
        left = max(1, int(1000 * (end - time.monotonic())))
        try:
            client.blocking_key_value_get(f"{name}/{index}", left)
        except RuntimeError:  # JaxRuntimeError: DEADLINE_EXCEEDED
            missing.append(index)
    return missing


@functools.cache
def quick_compilation() -> dict[str, Any]:
    """Compiler options for a program that runs a few times: two thirds of the time to compile.

    On CPU; it runs as fast, where what takes long are convolutions and dots.  Empty elsewhere, and
    without an option that this XLA does not have.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
    return {name: value for name, value in options.items() if _has_option(name, value)}


def _has_option(name: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except (RuntimeError, ValueError):
        return False
    return True


def container_name(kind: type, auxiliary: Any) -> tuple[str, str]:
    """The name under which a pytree container is registered with `jax.export`, and its data.

    Raises:
      ValueError: it is not registered.
    """
    if kind not in _export.serialization_registry:
        raise ValueError(
            f"the model's inputs or outputs are in a {kind.__name__}, which cannot be saved. Let "
            "apply_fn take and return tuples, lists and dicts, or register the class with "
            "jax.export.register_pytree_node_serialization"
        )
    name, serialize = _export.serialization_registry[kind]
    return name, base64.b64encode(bytes(serialize(auxiliary))).decode()


def container(name: str, auxiliary: str, children: Sequence[Any]) -> Any:
    """The container that `container_name` named.

    Raises:
      ValueError: it is not registered, or its data is damaged.
    """
    if name not in _export.deserialization_registry:
        raise ValueError(
            f"the model's inputs or outputs are in a {name[:60]!r}, which is not registered here; "
            "call jax.export.register_pytree_node_serialization before loading"
        )
    _, deserialize, from_children = _export.deserialization_registry[name]
    try:
        data = deserialize(base64.b64decode(auxiliary, validate=True))
        return from_children(data, tuple(children))
    except Exception as error:  # whatever the registered functions raise
        raise ValueError(f"the container {name[:60]!r} is damaged: {error!r}") from None


def key_implementation(dtype: Any) -> str:
    """The name of the generator that a dtype of PRNG keys belongs to."""
    return str(dtype._impl.name)


def constraints(inputs: Any) -> tuple[str, ...]:
    """What is assumed of the symbolic sizes in a tree of shapes: "s <= 512", sorted."""
    sizes = [size for leaf in jax.tree.leaves(inputs) for size in leaf.shape]
    scopes = {id(s.scope): s.scope for s in sizes if jax.export.is_symbolic_dim(s)}
    found = {c.debug_str for scope in scopes.values() for c in scope._explicit_constraints}
    return tuple(sorted(found))


def size_dtype() -> Any:
    """The dtype of a symbolic size as a value."""
    return jax.dtypes.canonicalize_dtype(np.int64)
