"""A dot with a stored weight as rows [M, K] times a matrix, whatever the order of its axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax

from jaxquant.graph import ir
from jaxquant.graph.sites import Site


@dataclasses.dataclass(frozen=True)
class StoredMatrix:
    """How the arrays of a dot are matrices: x [M, K], the weight as it is stored [K, N] or [N, K].

    Attributes:
      site: the dot; it has no batch axes.
      shape: of the stored weight.
      order: the stored axis that each axis of the weight is.
      sums_last: whether K is the last axis.
    """

    site: Site
    shape: tuple[int, ...]
    order: tuple[int, ...]
    sums_last: bool

    @property
    def length(self) -> int:
        """K."""
        return math.prod(self.shape[self.order[axis]] for axis in self.site.weight_axes.contracted)

    @property
    def columns(self) -> int:
        """N."""
        return math.prod(self.shape[self.order[axis]] for axis in self.site.weight_axes.free)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the other operand that are summed over, as the weight is stored."""
        own, weight = self.site.input_axes, self.site.weight_axes
        axes = (self.order[axis] for axis in weight.contracted)
        # The order of a sum is free, so that x is turned to the weight, which is the larger.
        return tuple(axis for _, axis in sorted(zip(axes, own.contracted, strict=True)))

    def rows(self, x: jax.Array) -> jax.Array:
        """The other operand as [M, K], K in the order in which the weight is stored."""
        free = self.site.input_axes.free
        rows = x.transpose([*free, *self.summed])
        return rows.reshape(math.prod(x.shape[axis] for axis in free), self.length)

    def matrix(self, array: jax.Array, along_sums: int) -> jax.Array:
        """An array of the weight as a matrix, of so many elements along K."""
        shape = (along_sums, self.columns)
        return array.reshape(shape[::-1] if self.sums_last else shape)

    def back(self, value: jax.Array, x: tuple[int, ...]) -> jax.Array:
        """A result [M, N] as the dot has it, for another operand of shape `x`."""
        free, channels = self.site.input_axes.free, self.site.weight_axes.free
        # The result's axes are the left operand's first; channels come as they are stored.
        ascending = sorted(channels, key=lambda axis: self.order[axis])
        sizes = [self.shape[self.order[axis]] for axis in ascending]
        value = value.reshape([*(x[axis] for axis in free), *sizes])
        places = [len(free) + ascending.index(axis) for axis in channels]
        rest = list(range(len(free)))
        return value.transpose([*rest, *places] if self.site.weight_position else [*places, *rest])


def stored_matrix(
    site: Site, shape: tuple[int, ...], movements: Sequence[ir.Equation] = ()
) -> StoredMatrix | None:
    """The matrix that a stored weight is in a dot; None where it is none.

    It is one where the axes that are summed over are its first ones or its last, and there are
    others, but no batch axes.

    Args:
      site: the dot.
      shape: of the weight as it is stored.
      movements: the equations through which the dot takes it.
    """
    contraction = site.as_contraction
    if not contraction.is_dot or contraction.has_batch or 0 in shape:
        return None
    if any(eqn.name != "transpose" for eqn in movements):
        return None
    order = tuple(range(len(shape)))
    for movement in movements:
        order = tuple(order[axis] for axis in movement.params["permutation"])
    # Transposes are read through, so that the matrix is the parameter as it is stored.
    summed = sorted(order[axis] for axis in site.weight_axes.contracted)
    count, rank = len(summed), len(shape)
    is_first, is_last = summed == [*range(count)], summed == [*range(rank - count, rank)]
    if count in (0, rank) or not (is_first or is_last):
        return None
    return StoredMatrix(site, shape, order, is_last)
