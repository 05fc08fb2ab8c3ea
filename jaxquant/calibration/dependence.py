"""Refuse a model in training mode: one whose result for a sample depends on its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph.batch import Mixing, find_mixing, may_mix
from jaxquant.graph.batch_sizes import batch_size, trace_for
from jaxquant.graph.evaluate import Forms, evaluate_model, no_forms
from jaxquant.graph.masks import find_mask
from jaxquant.graph.model import FloatModel, Model
from jaxquant.jax_shim import compilation

_TOLERANCE = 1e-3  # of the largest |output|; one program on one sample twice differs by nothing
_ADVICE = (
    "Quantization runs the model in inference mode: for an nnx model call `model.eval()` before "
    "`nnx.split`, for linen pass `train=False` or {linen}. Where the model means it, pass "
    "allow_batch_dependence=True"
)


def check_independence(
    source: FloatModel,
    inputs: tuple[Any, ...],
    forms: Forms = no_forms,
) -> None:
    """Raise ValueError where a sample's result depends on the others of its batch.

    That is where statistics are taken over the batch (BatchNorm in training mode), or a fixed key
    keeps dropout active.  Where anything is reduced along the batch at all, the model is traced for
    twice the batch, and both graphs tell whether samples are mixed; where they are, two batches
    that differ in their second half are run in float, and what leaves the first half's results as
    they are is let pass.  A model that takes no other batch size is not looked at.

    Args:
      source: the model.
      inputs: a batch; of shapes alone nothing is run.
      forms: those of the model's equations that run faster here.
    """
    model = source.trace(inputs)
    if mask := find_mask(model):
        layer, key = mask
        drawn_from = f"params[{key!r}]" if key else "a key that is fixed in apply_fn"
        raise ValueError(
            f"{layer} drops activations by a random mask that is drawn from {drawn_from}: dropout "
            f"is active, with one mask for every call. {_ADVICE.format(linen='deterministic=True')}"
        )
    size = batch_size(inputs)
    # Most models reduce nothing along the batch: they cost no second trace.
    if not size or not may_mix(model, size):
        return
    # First by the graph, which costs a trace; only a suspect is run.
    doubled = trace_for(source, inputs, 2 * size)
    mixing = None if doubled is None else find_mixing(model, doubled)
    if mixing is None or doubled is None:
        return
    if not _confirms(doubled, source.params, inputs, size, mixing, forms):
        return
    raise ValueError(
        f"the result for a sample depends on the other samples of its batch: {mixing.layer} takes "
        "statistics over the batch, as a BatchNorm in training mode does. "
        + _ADVICE.format(linen="use_running_average=True")
    )


def _has(x: Any, size: int) -> bool:
    return bool(x.shape) and x.shape[0] == size


def _confirms(
    doubled: Model,
    params: Any,
    inputs: tuple[Any, ...],
    size: int,
    mixing: Mixing,
    forms: Forms,
) -> bool:
    """Whether the outputs of the first half of a batch change with its second half."""
    leaves = jax.tree.leaves(inputs)
    # Of shapes alone nothing runs: what the graph shows decides.
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        return mixing.sums
    changed = [_others(x) if _has(x, size) else x for x in leaves]
    if all(x is other or np.array_equal(x, other) for x, other in zip(leaves, changed)):
        return mixing.sums  # nothing to see
    # The same first half with two second halves: whatever changes in it depends on the others.
    batches = [
        [jnp.concatenate([x, half]) if _has(x, size) else x for x, half in zip(leaves, halves)]
        for halves in (leaves, changed)
    ]

    def run(params: Any, flat: Sequence[Any]) -> list[jax.Array]:
        # An output where samples are mixed; others cannot tell.
        graph = doubled.graph
        env = evaluate_model(graph, params, flat, forms=forms(graph))
        return [
            _first_half(env.read(graph.outputs[position]), axis)
            for position, axis in mixing.outputs.items()
        ]

    step = jax.jit(run, compiler_options=compilation.quick_compilation())
    results = [jax.device_get(step(params, flat)) for flat in batches]
    return any(_differ(*both) for both in zip(*results, strict=True))


def _others(x: Any) -> Any:
    """Other samples that a model takes as well: brighter images, the vocabulary's first word."""
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return x * jnp.asarray(1.5, x.dtype)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.full(x.shape, jnp.min(x), x.dtype)
    return x


def _first_half(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, 0, x.shape[axis] // 2, axis=axis)


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    # Complex holds real and complex alike.
    a, b = (np.asarray(x).astype(np.complex128) for x in (a, b))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return False  # calibration names what is not finite
    largest = max(np.abs(a).max(initial=0.0), np.abs(b).max(initial=0.0))
    return bool(np.abs(a - b).max(initial=0.0) > _TOLERANCE * largest)
