"""Products of floats with a stored weight, of which only a block at a time is dequantized.

XLA's product on CPU reads its operands from memory.  A weight that is dequantized whole is written
to memory as floats first, and read again: five times the traffic of the float model, and its memory
besides.  A block of a few rows stays in the core's cache, so that one pass over the integers is all
that memory sees.  Other devices read the integers within their product, or are not short of
bandwidth for it; several devices keep a sharded weight where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.jax_shim import choices, jaxprs
from jaxquant.run.dequantize import StoredWeight, dequantize_groups, dequantize_weight

Dot = Callable[[jax.Array, jax.Array], jax.Array]

# Rows of a weight that are dequantized at once: few where few rows of x meet them, since the sums
# stay in the first cache then; more where the sums of many rows go to memory and back.
_FEWEST_ROWS, _MOST_ROWS = 16, 256
_ROWS_EACH = 4


def dot(x: jax.Array, stored: StoredWeight, precision: Any = None) -> jax.Array:
    """`x` times a stored weight that is a matrix, [K, N], or [N, K] where K is its last axis.

    Args:
      x: [M, K], floats; the dequantized weight is rounded to their dtype.
      stored: the weight; its layout's `order` is the identity and its `shape` has two axes.
      precision: of the product, as `lax.dot_general` takes it.

    Returns:
      float32 [M, N].
    """
    axis = stored.layout.axis
    columns = stored.layout.shape[1 - axis]

    def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
        numbers = (((1,), (axis,)), ((), ()))
        return lax.dot_general(
            x, weight.astype(x.dtype), numbers, precision, preferred_element_type=jnp.float32
        )

    def by_blocks(x: jax.Array, integers: jax.Array, scale: jax.Array) -> Sequence[jax.Array]:
        matrix = stored._replace(
            integers=integers if stored.weight_bits == 4 else integers.reshape(stored.layout.shape),
            scale=scale,
        )
        return [(_along_sums if axis == 0 else _along_outputs)(x, matrix, dot)]

    def whole(x: jax.Array, integers: jax.Array, scale: jax.Array) -> Sequence[jax.Array]:
        weight = dequantize_weight(stored._replace(integers=integers, scale=scale))
        return [dot(x, weight.reshape(stored.layout.shape))]

    def on_one_device(*operands: jax.Array) -> Sequence[jax.Array]:
        return lax.platform_dependent(*operands, cpu=by_blocks, default=whole)

    outputs = [jax.ShapeDtypeStruct((x.shape[0], columns), jnp.float32)]
    operands = [x, stored.integers, stored.scale]
    return choices.choose_by_devices(on_one_device, whole, outputs, operands)[0]


def _rows_at_once(samples: object) -> int:
    """How many rows of a weight are dequantized at once, for so many rows of x."""
    if not isinstance(samples, int):
        return _FEWEST_ROWS * _ROWS_EACH
    return min(max(_ROWS_EACH * samples, _FEWEST_ROWS), _MOST_ROWS)


def _along_sums(x: jax.Array, stored: StoredWeight, dot: Dot) -> jax.Array:
    """[M, N] from a weight [K, N]: the sum of the products with blocks of its rows."""
    length, columns = stored.layout.shape
    size, groups = stored.layout.size, stored.layout.groups
    packed = 2 if stored.weight_bits == 4 else 1
    rows = _rows_at_once(x.shape[0])
    if groups > 1:
        # whole groups, or an even part of one: a block's scales are its own then
        parts = [n for n in range(packed, rows + 1, packed) if size % n == 0]
        fits = size * packed <= rows
        rows = rows // (size * packed) * size * packed if fits else max(parts, default=0)
        if rows < min(_FEWEST_ROWS, size):  # a size without such a part
            rows = size * packed
    rows = min(rows, length)

    def partial(start: jax.Array | int, count: int) -> jax.Array:
        """The product of `count` columns of x, from `start`, with their rows of the weight."""
        integers = lax.dynamic_slice_in_dim(
            stored.integers, start // packed, -(-count // packed), axis=0
        )
        if groups == 1:
            scale = stored.scale
        else:
            scale = lax.dynamic_slice_in_dim(stored.scale, start // size, -(-count // size), axis=0)
        block = dequantize_groups(integers, scale, 0, count, size, stored.weight_bits)
        return dot(lax.dynamic_slice_in_dim(x, start, count, axis=1), block)

    whole, left = divmod(length, rows) if rows else (0, 0)
    total = jnp.zeros((x.shape[0], columns), jnp.float32)
    total = jaxprs.match_varying([total, x])[0]
    if whole:
        total = lax.fori_loop(0, whole, lambda i, sums: sums + partial(i * rows, rows), total)
    return total + partial(whole * rows, left) if left else total


def _along_outputs(x: jax.Array, stored: StoredWeight, dot: Dot) -> jax.Array:
    """[M, N] from a weight [N, K]: blocks of its rows give blocks of the columns."""
    columns, length = stored.layout.shape
    rows = min(_rows_at_once(x.shape[0]), columns)

    def partial(start: jax.Array | int, count: int) -> jax.Array:
        integers, scale = (
            lax.dynamic_slice_in_dim(array, start, count, axis=0)
            for array in (stored.integers, stored.scale)
        )
        size = stored.layout.size
        block = dequantize_groups(integers, scale, 1, length, size, stored.weight_bits)
        return dot(x, block)

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(result, partial(i * rows, rows), i * rows, axis=1)

    whole, left = divmod(columns, rows) if rows else (0, 0)
    result = jnp.zeros((x.shape[0], columns), jnp.float32)
    result = jaxprs.match_varying([result, x])[0]
    if whole:
        result = lax.fori_loop(0, whole, step, result)
    if left:
        start = whole * rows
        result = lax.dynamic_update_slice_in_dim(result, partial(start, left), start, axis=1)
    return result
