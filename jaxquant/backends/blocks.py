"""Products of floats with a stored weight, of which only a block at a time is dequantized.

XLA's product on CPU reads its operands from memory.  A weight that is dequantized whole is written
to memory as floats first, and read again: five times the traffic of the float model, and its memory
besides.  A block of a few rows stays in the core's cache, so that one pass over the integers is all
that memory sees.  Where x has many rows that is little beside the products, which are faster whole.
Other devices read the integers within their product, or are not short of bandwidth for it; several
devices keep a sharded weight where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends.backend import Product
from jaxquant.backends.dequantize import dequantize_groups, dequantize_halves
from jaxquant.jax_shim import choices, jaxprs

Dot = Callable[[jax.Array, jax.Array], jax.Array]

# Rows of a weight that are dequantized at once: as many as the second cache has room for.  With
# fewer the sums go to memory and back more often; 128 took the least time for 1 to 16 rows of x
# (one core with 1 MB, 640 and 2560 columns).
_FEWEST_ROWS, _MOST_ROWS = 16, 128
_FLOATS = 2**20
# Rows of x up to which blocks are faster (two cores, matrices of 384 to 2560): from 32 on they took
# 1.1 to 2 times as long as the float product, the whole weight 0.6 to 1.3 times.
_FEW_ROWS = 16


def dot(product: Product, x: jax.Array, integers: jax.Array, scale: jax.Array) -> jax.Array:
    """A product of float rows with a stored matrix; the weight is rounded to the rows' dtype.

    Args:
      product: what is multiplied; of one matrix.
      x, integers, scale: its operands.

    Returns:
      float32 [M, N].
    """
    axis = int(product.sums_last)

    def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
        numbers = (((1,), (axis,)), ((), ()))
        # Products of bfloat16 are summed in float32: the sums of many terms need its digits.
        return lax.dot_general(
            x,
            weight.astype(x.dtype),
            numbers,
            product.precision,
            preferred_element_type=jnp.float32,
        )

    # On CPU dequantized parts stay in the cache; other compilers fuse the whole into the dot.
    def by_blocks(x: jax.Array, integers: jax.Array, scale: jax.Array) -> Sequence[jax.Array]:
        if product.sums_last:
            return [_along_outputs(product, x, integers, scale, dot)]
        if not _has_few_rows(product):
            return whole(x, integers, scale)
        return [_along_sums(product, x, integers, scale, dot)]

    def whole(x: jax.Array, integers: jax.Array, scale: jax.Array) -> Sequence[jax.Array]:
        return [dot(x, _dequantized(product, integers, scale, axis, product.length))]

    def on_one_device(*operands: jax.Array) -> Sequence[jax.Array]:
        # Chosen when it is lowered: an exported program may run on another platform.
        return lax.platform_dependent(*operands, cpu=by_blocks, default=whole)

    operands = [x, integers, scale]
    # A loop over blocks would gather a sharded weight, so that several devices take it whole.
    return choices.choose_by_devices(on_one_device, whole, product.outputs, operands)[0]


def _dequantized(
    product: Product, integers: jax.Array, scale: jax.Array, axis: int, length: int
) -> jax.Array:
    """A part of the weight in float32, `length` of it along the sums, which are at `axis`."""
    return dequantize_groups(
        integers, scale, axis, length, product.group_size, product.weight_bits, product.weight_dtype
    )


def _has_few_rows(product: Product) -> bool:
    return isinstance(product.rows, int) and product.rows <= _FEW_ROWS


def _rows_at_once(width: int) -> int:
    """How many rows of a weight, of so many numbers, are dequantized at once."""
    return min(max(_FLOATS // max(width, 1), _FEWEST_ROWS), _MOST_ROWS)


def _along_sums(
    product: Product, x: jax.Array, integers: jax.Array, scale: jax.Array, dot: Dot
) -> jax.Array:
    """[M, N] from a weight [K, N]: the sum of the products with blocks of its rows."""
    (columns,), length, bits = product.columns, product.length, product.weight_bits
    size, groups = product.group_size, product.groups
    # Two codes of four bits share a byte, so a block begins at an even row.
    packed = 2 if bits == 4 else 1
    rows = _rows_at_once(columns)
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
        part = lax.dynamic_slice_in_dim(integers, start // packed, -(-count // packed), axis=0)
        scales = scale
        if groups > 1:
            scales = lax.dynamic_slice_in_dim(scale, start // size, -(-count // size), axis=0)
        block = _dequantized(product, part, scales, 0, count)
        return dot(lax.dynamic_slice_in_dim(x, start, count, axis=1), block)

    # The rows that are left over have a block of their own: its size is static, as all shapes are.
    whole, left = divmod(length, rows) if rows else (0, 0)
    total = jnp.zeros((x.shape[0], columns), jnp.float32)
    # Inside `shard_map` the sum varies over devices as x does; a constant of zeros would not.
    total = jaxprs.match_varying([total, x])[0]
    if whole:
        total = lax.fori_loop(0, whole, lambda i, sums: sums + partial(i * rows, rows), total)
    return total + partial(whole * rows, left) if left else total


def _along_outputs(
    product: Product, x: jax.Array, integers: jax.Array, scale: jax.Array, dot: Dot
) -> jax.Array:
    """[M, N] from a weight [N, K]: blocks of its rows give blocks of the columns.

    Where x has many rows, all columns are one block.
    """
    (columns,), size, bits = product.columns, product.group_size, product.weight_bits
    # An odd group size would put the two codes of a byte under two scales.
    is_apart = bits == 4 and (product.groups == 1 or size % 2 == 0)
    # Two codes a byte: those at even and at odd places of K are unpacked apart, and summed with
    # their own columns of x, so that none is moved.
    if is_apart:
        halves = jnp.pad(x, ((0, 0), (0, product.length % 2)))
        halves = halves.reshape(x.shape[0], -1, 2)
        even, odd = halves[:, :, 0], halves[:, :, 1]
    rows = min(_rows_at_once(product.length), columns) if _has_few_rows(product) else columns

    def partial(start: jax.Array | int, count: int) -> jax.Array:
        part, scales = (
            lax.dynamic_slice_in_dim(array, start, count, axis=0) for array in (integers, scale)
        )
        # Codes in pairs stay apart: even and odd rows are two products, and no nibble is moved.
        if is_apart:
            low, high = dequantize_halves(part, scales, size, product.weight_dtype)
            return dot(even, low) + dot(odd, high)
        return dot(x, _dequantized(product, part, scales, 1, product.length))

    def step(i: jax.Array, result: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(result, partial(i * rows, rows), i * rows, axis=1)

    # Many rows of x take all columns at once, without a loop.
    if rows == columns:
        return partial(0, columns)
    whole, left = divmod(columns, rows)
    result = jnp.zeros((x.shape[0], columns), jnp.float32)
    result = jaxprs.match_varying([result, x])[0]
    if whole:
        result = lax.fori_loop(0, whole, step, result)
    if left:
        start = whole * rows
        result = lax.dynamic_update_slice_in_dim(result, partial(start, left), start, axis=1)
    return result
