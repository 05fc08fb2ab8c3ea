"""A computation with several forms, of which one is chosen when it is lowered: by its place."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax._src import dispatch
from jax.interpreters import ad, batching, mlir

from jaxquant.jax_shim.jaxprs import Primitive, match_varying

Form: TypeAlias = Callable[..., Sequence[Any]]

# A computation with several forms, of which one is traced when it is lowered.
_choice = Primitive("jaxquant_choice")
_choice.multiple_results = True


class Place(NamedTuple):
    """Where a computation will run.

    Attributes:
      platform: "cpu", "cuda", "rocm" or "tpu"; "" for any other.
      is_export: whether it is exported, and may run elsewhere.
      is_one_device: whether it is for one device, and known to be.
      kind: of the devices, as JAX names it ("TPU v6 lite"); "" where they are not known.
    """

    platform: str
    is_export: bool
    is_one_device: bool
    kind: str = ""


ONE_CPU = Place("cpu", is_export=False, is_one_device=True)
_known = contextvars.ContextVar[Place | None]("jaxquant_place", default=None)


@contextlib.contextmanager
def at(place: Place) -> Iterator[None]:
    """What is traced inside runs at this place and no other: its forms are chosen at once."""
    token = _known.set(place)
    try:
        yield
    finally:
        _known.reset(token)


def choose(
    pick: Callable[[Place], int],
    forms: Sequence[Form],
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
) -> list[Any]:
    """The results of one of several forms.

    Args:
      pick: which of the forms, by the place.
      forms: functions of the operands that give arrays like `outputs`; only those that are picked
        are traced.  The last one is differentiated, whichever runs.
      outputs: shape and dtype of the results.
      operands: arrays.
    """

    # Inside `at` there is nothing to wait for, and no primitive to lower.
    if (place := _known.get()) is not None:
        return list(forms[pick(place)](*operands))
    shapes = tuple((tuple(s.shape), s.dtype) for s in outputs)
    # What `shard_map` asks of operands of one primitive.
    operands = match_varying(operands)
    return list(_choice.bind(*operands, pick=pick, forms=tuple(forms), shapes=shapes))


def choose_by_devices(
    one: Form, several: Form, outputs: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any]
) -> list[Any]:
    """`several(*operands)` where it is compiled for known devices, more than one; else `one`.

    Both give a list of arrays like `outputs`.
    """
    return choose(_unless_one_device, (one, several), outputs, operands)


def choose_on_one_cpu(
    native: Form, portable: Form, outputs: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any]
) -> list[Any]:
    """`native(*operands)` where it is compiled for this process's one CPU device.

    Else `portable(*operands)`: on other devices, sharded, exported.
    """
    return choose(_unless_one_cpu, (native, portable), outputs, operands)


def _unless_one_device(place: Place) -> int:
    return int(not place.is_one_device)


def _unless_one_cpu(place: Place) -> int:
    return int(place.platform != "cpu" or place.is_export or not place.is_one_device)


def _place(ctx: Any, platform: str) -> Place:
    module, devices = ctx.module_context, ctx.module_context.axis_context
    # No assignment means the default device, which is one.
    is_one_device = hasattr(devices, "device_assignment") and (
        devices.device_assignment is None or len(devices.device_assignment) == 1
    )
    assigned = getattr(devices, "device_assignment", None)
    kind = assigned[0].device_kind if assigned else ""
    return Place(platform, module.lowering_parameters.for_export, is_one_device, kind)


def _choice_avals(*avals: Any, shapes: Any, **_: Any) -> list[Any]:
    """The outputs vary, inside `shard_map`, where the operands do: those vary alike."""
    # `match_varying` has made them alike, so any one will do.
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
    ctx: Any, *operands: Any, pick: Any, forms: Any, platform: str = "", **_: Any
) -> Any:
    # Only now is anything traced: the other forms may hold calls that this platform does not know.
    chosen = forms[pick(_place(ctx, platform))]
    return mlir.lower_fun(lambda *xs: list(chosen(*xs)), multiple_results=True)(ctx, *operands)


def _choice_batching(
    operands: Sequence[Any], axes: Sequence[Any], *, forms: Any, shapes: Any, **params: Any
) -> tuple[list[Any], list[int]]:
    # Which form runs is not known before lowering, so all of them are mapped.
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    results = _choice.bind(
        *operands,
        forms=tuple(jax.vmap(form, tuple(axes)) for form in forms),
        shapes=tuple(((size, *shape), dtype) for shape, dtype in shapes),
        **params,
    )
    return list(results), [0] * len(shapes)


def _choice_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, forms: Any, **_: Any
) -> tuple[list[Any], list[Any]]:
    """The derivative is that of the last form, which JAX can differentiate if any."""
    # Symbolic zeros are nothing that `jax.jvp` takes.
    given = [ad.instantiate_zeros(t) for t in tangents]
    given = [_float0(x) if x.dtype == jax.dtypes.float0 else x for x in given]
    outs, derivatives = jax.jvp(lambda *xs: list(forms[-1](*xs)), tuple(primals), tuple(given))
    return outs, [
        ad.Zero(jax.typeof(x).to_tangent_aval()) if d.dtype == jax.dtypes.float0 else d
        for x, d in zip(outs, derivatives, strict=True)
    ]


def _float0(zeros: Any) -> np.ndarray:
    """The tangent of integers, as `jax.jvp` takes it."""
    return np.zeros(zeros.shape, jax.dtypes.float0)


def _choice_now(*operands: Any, **params: Any) -> Any:
    """The form is chosen when it is compiled, under `jax.disable_jit` too."""

    # A primitive has no Python to run: without a compiler nothing would choose.
    with jax.disable_jit(False):
        return jax.jit(lambda *xs: _choice.bind(*xs, **params))(*operands)


_choice.def_abstract_eval(_choice_avals)
_choice.def_impl(_choice_now)
ad.primitive_jvps[_choice] = _choice_jvp
batching.primitive_batchers[_choice] = _choice_batching
mlir.register_lowering(_choice, _choice_lowering)
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    _lowering = functools.partial(_choice_lowering, platform=_platform)
    mlir.register_lowering(_choice, _lowering, platform=_platform)
# Else a lowering does not learn of the devices, one or several, that it is for.
dispatch.prim_requires_devices_during_lowering.add(_choice)
