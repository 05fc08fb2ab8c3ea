"""Products whose rows are in groups, each of which meets a weight of its own (`lax.ragged_dot`).

The letters are those of `jaxquant.backends.matrices`.  The rows behind all groups, where the sizes
of these are less than M together, are zero in the result.

JAX's own form on CPU and GPU makes G copies of x and multiplies all of them.  This one goes through
the rows in blocks of one group each, so that next to nothing is multiplied but what is asked for,
and one weight is read at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends.matrices import Matrices
from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph.contraction import Contraction
from jaxquant.jax_shim import jaxprs

# The rows of a block: as many as a group has in the mean, within these.
_FEWEST_ROWS, _MOST_ROWS = 8, 128

# (rows [R, K] of one group, the place of its weight among B * G) -> [R, N]
Product = Callable[[jax.Array, jax.Array], jax.Array]


def sums(
    contraction: Contraction,
    x: jax.Array,
    weight: jax.Array,
    sizes: jax.Array,
    zero_point: ZeroPoint,
) -> jax.Array:
    """A ragged dot of int8 values, less their zero point, with int8 weights; to int32.

    Args:
      contraction: the ragged dot.
      x, weight, sizes: its operands, the weight as it is stored.
      zero_point: of x.
    """
    layout = Matrices(contraction, 1, x.shape, weight.shape)
    rows, weights, ends = layout.x(x), layout.weight(weight), layout.ends(sizes)
    weights = weights.reshape(-1, layout.summed, layout.columns)
    offsets = None
    if not is_zero(zero_point):
        offsets = zero_point * jnp.sum(weights, axis=1, dtype=jnp.int32)  # [B * G, N]

    def product(block: jax.Array, place: jax.Array) -> jax.Array:
        weight = lax.dynamic_index_in_dim(weights, place, keepdims=False)
        total = lax.dot(block, weight, preferred_element_type=jnp.int32)
        return total if offsets is None else total - lax.dynamic_index_in_dim(offsets, place)

    return layout.back(by_blocks(layout, rows, ends, product, zero_point, jnp.int32))


def of_rows(
    contraction: Contraction, values: jax.Array, x: jax.Array, weight: jax.Array, sizes: jax.Array
) -> jax.Array:
    """What the channels of the weight have, for each element of the result by what its row chose.

    Args:
      contraction: the ragged dot.
      values: [C], in the order of the stored weight's axes.
      x, weight, sizes: its operands, the weight as it is stored.
    """
    layout = Matrices(contraction, 1, x.shape, weight.shape)
    given, ends = layout.of_channels(values), layout.ends(sizes)
    # A row is in the first group whose end is beyond it: it counts the ends that it has passed.
    passed = jnp.arange(layout.rows)[None, :, None] >= ends[:, None, :]
    chosen = jnp.minimum(jnp.sum(passed, axis=2, dtype=jnp.int32), layout.groups - 1)  # [P, M]
    batch = layout.batch_of(jnp.arange(layout.side_by_side))
    return layout.back(given[batch[:, None], chosen])


def with_zeros(rows: jax.Array, ends: jax.Array, zero: ZeroPoint) -> jax.Array:
    """x [P, M, K] with zeros behind its groups: those rows may be in the last group then."""
    behind = jnp.arange(rows.shape[1]) >= ends[:, -1:]
    return jnp.where(behind[:, :, None], jnp.asarray(zero).astype(rows.dtype), rows)


def by_blocks(
    layout: Matrices,
    rows: jax.Array,
    ends: jax.Array,
    product: Product,
    zero: ZeroPoint,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """The result [P, M, N], block after block.

    Args:
      layout: of the ragged dot.
      rows: x as [P, M, K].
      ends: of the groups.
      product: gives the result of the rows of a block.
      zero: what stands for zero in x.
      dtype: of the result.
    """
    side, count, columns = layout.side_by_side, layout.rows, layout.columns
    if side == 0 or layout.groups == 0:
        return jnp.zeros((side, count, columns), dtype)
    rows = with_zeros(rows, ends, zero)
    # Rows behind all groups are zeros by now, so the last group may take them: each row is in one.
    ends = ends.at[:, -1].set(count)

    # One loop goes through the rows of all products, so that ends are counted among these.
    first = jnp.arange(side, dtype=jnp.int32)[:, None] * count
    ends = (ends + first).reshape(-1)  # among all rows
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    size = _block(side * count, side * layout.groups)
    # An empty group has no block, and costs nothing.
    blocks = jnp.cumsum((ends - starts + size - 1) // size)  # up to each group's end

    # A block that begins near the end reaches beyond it: into rows that are cut off again.
    padded = jnp.pad(rows.reshape(side * count, layout.summed), ((0, size), (0, 0)))
    result = jnp.zeros((side * count + size, columns), dtype)
    padded, result, starts, blocks = jaxprs.match_varying([padded, result, starts, blocks])

    def step(number: jax.Array, result: jax.Array) -> jax.Array:
        # How long groups are is known in the call alone: a block finds its group by counting.
        group = jnp.sum(blocks <= number, dtype=jnp.int32)
        before = jnp.where(group > 0, blocks[group - 1], 0)
        start = starts[group] + (number - before) * size
        block = lax.dynamic_slice_in_dim(padded, start, size)
        place = layout.batch_of(group // layout.groups) * layout.groups + group % layout.groups
        # What a block has beyond the end of its group, the blocks behind it write anew.
        return lax.dynamic_update_slice_in_dim(result, product(block, place), start, axis=0)

    result = lax.fori_loop(0, blocks[-1], step, result)
    return result[: side * count].reshape(side, count, columns)


def _block(rows: object, groups: object) -> int:
    # Of sizes that vary the mean is not known.
    if not isinstance(rows, int) or not isinstance(groups, int):
        return _MOST_ROWS
    return min(max(-(-rows // max(groups, 1)), _FEWEST_ROWS), _MOST_ROWS)
