"""Attention, GELU and layer normalization by the native kernels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxquant import native
from jaxquant.backends.backend import FloatOperation
from jaxquant.graph.attention import Layout
from jaxquant.graph.attention_scores import Addend

# Of the inputs: what is narrower than float32 is made that first.
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.bool_)


def has(operation: FloatOperation) -> bool:
    """True where there is a kernel for an operation."""
    # Of these kernels that of GELU alone rounds its result.
    if operation.is_int8 and operation.kind != "gelu":
        return False
    if any(each.dtype not in _DTYPES for each in operation.inputs):
        return False
    # A kernel goes along numbers that are together in memory.
    if operation.kind == "layer_norm":
        return bool(operation.params["axis"] == len(operation.inputs[0].shape) - 1)
    return operation.kind in ("attention", "gelu")


def run(operation: FloatOperation, *operands: jax.Array) -> jax.Array:
    """The result of an operation that there is a kernel for."""
    # Made float32 first, a cache would be written and read again in every step.
    as_they_are = _read_narrow(operation)
    inputs = [
        x.astype(jnp.float32) if x.dtype == jnp.bfloat16 and place not in as_they_are else x
        for place, x in enumerate(operands[: len(operation.inputs)])
    ]
    if operation.kind == "attention":
        result = _attention(operation, *inputs)
    elif operation.kind == "layer_norm":
        result = _layer_norm(operation, *inputs)
    else:
        out = native.Requantize(*operands[-2:]) if operation.is_int8 else None
        by_tanh = operation.params["approximate"] == "tanh"
        result = native.gelu(*inputs, approximate=by_tanh, out=out)
    # Kernels give float32, or int8 where they round.
    return result.astype(operation.output.dtype)


def _read_narrow(operation: FloatOperation) -> tuple[int, ...]:
    """The places of bfloat16 inputs that a kernel reads as they lie: caches of keys and values."""
    if operation.kind != "attention":
        return ()
    q, k, v = operation.inputs[:3]
    rows = q.shape[operation.params["layout"].query[-2]]
    return (1, 2) if k.dtype == v.dtype == jnp.bfloat16 and native.is_few(rows) else ()


def _attention(operation: FloatOperation, *inputs: jax.Array) -> jax.Array:
    params = operation.params
    layout: Layout = params["layout"]
    biases, masks = params["biases"], params["masks"]
    q, k, v, *beside = inputs
    of_biases, of_masks = beside[: len(biases)], beside[len(biases) :]
    # The kernel takes one bias and one mask: several are joined, which is small beside the scores.
    bias = _joined(operator.add, biases, of_biases)
    mask = _joined(operator.and_, masks, of_masks)
    order = tuple(range(len(layout.result)))
    axes = native.AttentionAxes(
        *layout,
        bias=() if bias is None else order,
        mask=() if mask is None else order,
    )
    return native.attention(
        q, k, v, bias, mask, axes=axes, scale=params["scale"], fill=params["fill"]
    )


def _joined(
    join: Callable[[jax.Array, jax.Array], jax.Array],
    addends: Sequence[Addend],
    arrays: Sequence[jax.Array],
) -> jax.Array | None:
    """What is beside the scores as one tensor [batch, keys, rows]; None where nothing is."""
    parts = []
    for addend, array in zip(addends, arrays, strict=True):
        # Where an addend repeats itself one entry is enough: the kernel broadcasts.
        axes = range(array.ndim)
        once = tuple(slice(None) if axis in addend.varying else slice(0, 1) for axis in axes)
        more = [axis for axis in axes if axis not in addend.axes]  # of size 1
        small = array[once].transpose((*more, *addend.axes))
        small = small.reshape(small.shape[len(more) :])
        parts.append(~small if addend.negated else small)
    return functools.reduce(join, parts) if parts else None


def _layer_norm(operation: FloatOperation, x: jax.Array, *vectors: jax.Array) -> jax.Array:
    rest = list(vectors)
    scale = rest.pop(0) if operation.params["has_scale"] else None
    bias = rest.pop(0) if operation.params["has_bias"] else None
    return native.layer_norm(x, scale, bias, epsilon=operation.params["epsilon"])
