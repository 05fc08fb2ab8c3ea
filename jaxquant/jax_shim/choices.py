"""A computation with two forms, one of which is chosen when it is lowered, by where it will run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import dispatch
from jax.interpreters import batching, mlir

from jaxquant.jax_shim.jaxprs import Primitive, match_varying

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
