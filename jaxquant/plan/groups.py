"""How the weights of a site fall into groups that share a scale, when weights alone are quantized.

The axes of a weight that are summed over are flattened, in the weight's axis order, to one axis of
size K; every `group_size` neighbours along it share a scale, and the last group holds what is left.
So a scale belongs to one output channel, and no weight is padded.

Scales of groups are bfloat16: beside 32 weights of 4 bits a float32 would be a whole bit of each.
Those of whole channels are few, and float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """A weight with its summed axes as one.

    Attributes:
      order: the permutation of the weight's axes that brings the summed ones together; the identity
        where they are neighbours.
      permuted: the weight's shape in that order.
      shape: `permuted` with the summed axes flattened to one, of size K.
      axis: where K is in `shape`.
      size: the group size; K for one scale per channel.
      scale_dtype: of the scales: bfloat16 where a group size was asked for, else float32.
    """

    order: tuple[int, ...]
    permuted: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int
    size: int
    scale_dtype: np.dtype

    @property
    def groups(self) -> int:
        return -(-self.shape[self.axis] // self.size)

    def place(self, axis: int) -> int:
        """Where an axis of the weight that is not summed over is in `shape`."""
        at = self.order.index(axis)
        # Behind the flattened axis there are fewer axes than in the weight.
        return at if at < self.axis else at - (len(self.permuted) - len(self.shape))

    def of_one(self, axis: int) -> GroupLayout:
        """The groups of a single index along an axis of the weight that is not summed over."""
        at, place = self.order.index(axis), self.place(axis)
        return dataclasses.replace(
            self,
            permuted=tuple(1 if n == at else size for n, size in enumerate(self.permuted)),
            shape=tuple(1 if n == place else size for n, size in enumerate(self.shape)),
        )

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation back to the weight's own order of axes."""
        return tuple(int(a) for a in np.argsort(self.order))


def group_layout(
    shape: Sequence[int], channels: Sequence[int], group_size: int | None
) -> GroupLayout:
    """The groups of a weight whose axes `channels` are not summed over.

    Example:
      >>> layout = group_layout((3, 3, 64, 128), (3,), 32)  # [H, W, I, O]
      >>> layout.shape, layout.axis, layout.groups
      ((576, 128), 0, 18)
    """
    # All but the channels are summed over, so that a group belongs to one of them.
    summed = [a for a in range(len(shape)) if a not in channels]
    first = summed[0] if summed else len(shape)
    # Summed axes that lie apart are brought together behind the channels.
    if summed != list(range(first, first + len(summed))):
        first = len(shape) - len(summed)
        order = (*(a for a in range(len(shape)) if a in channels), *summed)
    else:
        order = tuple(range(len(shape)))
    permuted = tuple(shape[a] for a in order)
    length = math.prod(permuted[first : first + len(summed)])
    flat = (*permuted[:first], length, *permuted[first + len(summed) :])
    # At most the whole, so that a short channel is one group.
    size = max(1, min(group_size or length, length))
    scale_dtype = np.dtype(np.float32 if group_size is None else jnp.bfloat16)
    return GroupLayout(order, permuted, flat, first, size, scale_dtype)
