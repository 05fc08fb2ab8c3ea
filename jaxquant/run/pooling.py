"""Max pooling of int8, and which pools of floats may run in int8.

Rounding is monotone, so the maximum of a window may be taken before or behind it.  A pool whose
result is quantized, and read in no other way, therefore runs on the quantized input: the same bits,
a quarter of the memory, and no float copy of what is often the largest tensor of a network.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir, symbolic
from jaxquant.jax_shim import choices, jaxprs
from jaxquant.plan.binding import Binding
from jaxquant.plan.liveness import read_in_float

_MAX_POOL = "reduce_window_max"
# A window of at most this many elements is a maximum of shifted slices, which XLA fuses.
_MAX_ELEMENTS = 64


def find_early_pools(
    graph: ir.Graph, binding: Binding, live: Sequence[ir.Equation]
) -> dict[ir.Var, ir.Equation]:
    """The max pools that may run on integers, by the tensor that they give.

    Args:
      graph: the traced model.
      binding: the plan in it.
      live: the equations that run.
    """
    # Where somebody reads the floats these have to be computed anyway, and two pools save nothing.
    floats = read_in_float(binding, live)
    return {
        eqn.outputs[0]: eqn
        for eqn in live
        if eqn.name == _MAX_POOL
        and eqn.outputs[0] in binding.names
        and eqn.outputs[0] not in binding.per_channel  # the window may reach over channels
        and eqn.outputs[0] not in floats
        and not graph.is_static(eqn.inputs[0])
        and _has_no_empty_window(eqn.params)
    }


def _has_no_empty_window(params: Mapping[str, Any]) -> bool:
    """True where every window has an element: -inf has no integer."""
    undilated = {*params["base_dilation"], *params["window_dilation"]} == {1}
    sizes = params["window_dimensions"]
    # Between dilated elements, and in a window of padding alone, the model has -inf.
    return undilated and all(
        0 <= pad < size for pads, size in zip(params["padding"], sizes, strict=True) for pad in pads
    )


def max_pool(x: jax.Array, eqn: ir.Equation) -> jax.Array:
    """`reduce_window_max` of an int8 array, padded with the lowest integer.

    Small windows run as slices but on a TPU, where that takes four times the cycles of XLA's own
    form by its estimate, and where the compiler aborts on int8 that is padded and then sliced with
    a stride of 2 in batches of 32 and more (libtpu 0.0.42.1).
    """

    def as_it_is(x: jax.Array) -> Sequence[jax.Array]:
        return jaxprs.bind(eqn.primitive, [x], dict(eqn.params))

    def by_slices(x: jax.Array) -> Sequence[jax.Array]:
        return [_by_slices(x, eqn.params)]

    if not _runs_as_slices(x, eqn.params):
        (result,) = as_it_is(x)
        return result
    # Only a TPU gains by slices, and where it runs is known when it is lowered.
    (output,) = jax.eval_shape(as_it_is, x)
    (result,) = choices.choose(_on_tpu, (by_slices, as_it_is), [output], [x])
    return result


def _on_tpu(place: choices.Place) -> int:
    return int(place.platform == "tpu")


def _by_slices(x: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """The maximum of the slices that the elements of a window reach."""
    # The lowest integer loses every comparison, as -inf does.
    padded = lax.pad(x, jnp.int8(-128), [(*pads, 0) for pads in params["padding"]])
    strides, sizes = params["window_strides"], params["window_dimensions"]
    spans = list(padded.shape)
    for a in _windowed_axes(params):
        # As far as whole strides reach: what is left over no window covers.
        spans[a] = (padded.shape[a] - sizes[a]) // strides[a] * strides[a] + 1
    parts = [
        lax.slice(padded, at, [a + s for a, s in zip(at, spans, strict=True)], strides)
        for at in itertools.product(*map(range, sizes))
    ]
    return functools.reduce(lax.max, parts)


def _runs_as_slices(x: jax.Array, params: Mapping[str, Any]) -> bool:
    """True where a window fits, is small enough, and none is empty."""
    sizes, pads = params["window_dimensions"], params["padding"]
    # A size that is a symbol may be smaller than the window, whose slices would then not exist.
    return (
        math.prod(sizes) <= _MAX_ELEMENTS
        and _has_no_empty_window(params)
        and all(
            symbolic.at_least(x.shape[a] + sum(pads[a]), sizes[a]) for a in _windowed_axes(params)
        )
    )


def _windowed_axes(params: Mapping[str, Any]) -> list[int]:
    """The axes along which windows have a size or a stride.

    The others may have sizes that are symbols.
    """
    pairs = zip(params["window_dimensions"], params["window_strides"], strict=True)
    return [axis for axis, pair in enumerate(pairs) if pair != (1, 1)]
