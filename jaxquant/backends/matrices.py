"""The operands of any dot with a weight as matrices: what becomes of axes in whatever order.

`P` products side by side, of `M` rows each, which are in `G` groups, one after the other; `K`
products a sum, `N` columns.  The rows x are [P, M, K], the weights [B, G, K, N], the result
[P, M, N]; P is B times the number of products that share weights.  Without batch axes P is 1, and
but for a ragged dot, whose groups each meet a weight of their own, G is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.graph.contraction import Axes, Contraction


def matrices_of(weight: jax.Array, own: Axes) -> jax.Array:
    """[B, G, K, N] of a weight.

    Args:
      weight: the whole weight, without copies left out.
      own: its axes in the dot.
    """
    parts = own.batch, own.chosen, own.contracted, own.free
    shape = [math.prod(weight.shape[axis] for axis in part) for part in parts]
    return weight.transpose([axis for part in parts for axis in part]).reshape(shape)


class Matrices:
    """How the arrays of one dot are matrices.

    Args:
      contraction: the dot, ragged or not.
      position: 0 or 1, the weight's place among the operands.
      x, weight: the shapes of the operands, the weight's as it is stored: of size 1 along axes that
        hold copies.

    Attributes:
      batch: B.
      side_by_side: P.
      rows: M.
      groups: G.
      summed: K.
      columns: N.
    """

    def __init__(
        self, contraction: Contraction, position: int, x: tuple[int, ...], weight: tuple[int, ...]
    ):
        self._own, self._of_weight = (contraction.operands[k] for k in (1 - position, position))
        own, of_weight = self._own, self._of_weight
        self._is_first = position == 0
        # Free axes before the one that groups are along make products; those behind it, rows of
        # one.
        at = 0 if contraction.choosing is None else own.free.index(contraction.choosing)
        each = own.free[at + 1 :] if contraction.choosing is not None else ()
        # A weight that all of a batch share has a size of 1 there: its result has the batch's.
        copied = dict(zip(of_weight.batch, (x[axis] for axis in own.batch), strict=True))
        self._stored = weight
        self._weight = tuple(copied.get(axis, size) for axis, size in enumerate(weight))
        self._sizes = [
            [x[axis] for axis in own.batch],
            [x[axis] for axis in own.free],
            [weight[axis] for axis in of_weight.free],
        ]
        self._each = math.prod(x[axis] for axis in each)  # rows of one that is in a group
        self._shared = math.prod(x[axis] for axis in own.free[:at])
        self.batch = math.prod(self._sizes[0])
        self.side_by_side = self.batch * self._shared
        self.rows = math.prod(x[axis] for axis in own.free[at:])
        self.groups = math.prod(weight[axis] for axis in of_weight.chosen)
        self.summed = math.prod(x[axis] for axis in own.contracted)
        self.columns = math.prod(self._sizes[2])

    def x(self, x: jax.Array) -> jax.Array:
        """[P, M, K]."""
        ordered = x.transpose((*self._own.batch, *self._own.free, *self._own.contracted))
        return ordered.reshape(self.side_by_side, self.rows, self.summed)

    def weight(self, weight: jax.Array) -> jax.Array:
        """[B, G, K, N]."""
        return matrices_of(jnp.broadcast_to(weight, self._weight), self._of_weight)

    def of_channels(self, values: jax.Array, has_groups: bool = True) -> jax.Array:
        """[B, G, N] from a value for each channel of the stored weight, [C], or for all, [].

        Args:
          values: in the order of the weight's axes.
          has_groups: False where the values of all groups are the same, [C / G].
        """
        own = self._of_weight
        chosen = own.chosen if has_groups else ()
        # In the order of the stored weight, as the values of channels are.
        kept = [axis for axis in own.kept if axis in (*own.batch, *own.free, *chosen)]
        if values.ndim:
            values = values.reshape([self._stored[axis] for axis in kept])
        values = jnp.broadcast_to(values, [self._weight[axis] for axis in kept])
        order = [kept.index(axis) for axis in (*own.batch, *chosen, *own.free)]
        by_group = values.transpose(order).reshape(self.batch, -1, self.columns)
        return jnp.broadcast_to(by_group, (self.batch, self.groups, self.columns))

    def ends(self, sizes: jax.Array | None) -> jax.Array:
        """int32 [P, G], where each group ends among its M rows.

        Args:
          sizes: of the groups of a ragged dot, [G], or with the axes of x before it that are in P;
            None of another.
        """
        if sizes is None:
            return jnp.full((self.side_by_side, 1), self.rows, jnp.int32)
        each = sizes.astype(jnp.int32).reshape(-1, self.groups) * self._each
        # The sizes may add up to more rows than there are.
        ends = jnp.minimum(jnp.cumsum(each, axis=1), self.rows)
        return jnp.broadcast_to(ends, (self.side_by_side, self.groups))

    def back(self, result: jax.Array) -> jax.Array:
        """A result [P, M, N] as the dot has it."""
        batch, own, others = self._sizes
        whole = result.reshape(*batch, *own, *others)
        return whole.transpose(self._order(own, others)) if self._is_first else whole

    def of_result(self, value: jax.Array) -> jax.Array:
        """[P, M, N] of an array that is as the result of the dot."""
        _, own, others = self._sizes
        if self._is_first:
            value = value.transpose(self._order(others, own))
        return value.reshape(self.side_by_side, self.rows, self.columns)

    def _order(self, first: Sequence[int], second: Sequence[int]) -> list[int]:
        """The axes of an array [*batch, *first, *second] in the order [*batch, *second, *first]."""
        start = len(self._sizes[0])
        middle, end = start + len(first), start + len(first) + len(second)
        return [*range(start), *range(middle, end), *range(start, middle)]

    @property
    def result(self) -> tuple[int, ...]:
        """The shape of the dot's result."""
        batch, own, others = self._sizes
        return (*batch, *others, *own) if self._is_first else (*batch, *own, *others)

    def batch_of(self, product: jax.Array) -> jax.Array:
        """The place among B of what the product at a place among P has."""
        return product // self._shared
