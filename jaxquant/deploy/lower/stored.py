"""Weights that are stored as integers, a scale for each group of them, as exporters take them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxquant.plan.groups import GroupLayout
from jaxquant.weights.groups import unpack


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight as it is stored.

    Attributes:
      integers: int8, in `layout.shape`.
      scale: float32, likewise with the groups in place of what is summed over.
      layout: its groups.
      bits: of the integers.
      axes: for each axis of the weight, which axis of `layout.permuted` it is.
      is_table: rows of it are looked up too, which then read what a dot does: it is in the file
        once, as [V, K].
    """

    integers: np.ndarray
    scale: np.ndarray
    layout: GroupLayout
    bits: int
    axes: tuple[int, ...]
    is_table: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether a lookup and a dot may read one array; ONNX picks no rows of 4-bit integers."""
        return self.is_table and self.bits == 8

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.layout.permuted[axis] for axis in self.axes)

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the weight that a group goes along, in the order in which it does."""
        return tuple(map(self.axes.index, self._flattened))

    @property
    def _flattened(self) -> range:
        """The axes of `layout.permuted` that are one in `layout.shape`."""
        first = self.layout.axis
        return range(first, first + len(self.layout.permuted) - len(self.layout.shape) + 1)

    def transposed(self, permutation: Sequence[int]) -> Stored:
        return dataclasses.replace(self, axes=tuple(self.axes[a] for a in permutation))

    def matrix(self, channels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The integers [K, N] and scales [G, N], the weight's axes `channels` as N."""
        # What is summed over is one axis of the stored array already; channels are apart.
        layout = self.layout
        kept = [axis for axis in range(len(layout.permuted)) if axis not in self._flattened]
        order = [1 + kept.index(self.axes[axis]) for axis in channels]
        found = []
        for array in (self.integers, self.scale):
            rows = np.moveaxis(array, layout.axis, 0)
            apart = rows.reshape(len(rows), *(layout.permuted[axis] for axis in kept))
            found.append(apart.transpose(0, *order).reshape(len(rows), -1))
        return found[0], found[1]


def read(integers: np.ndarray, scale: np.ndarray, layout: GroupLayout, bits: int) -> Stored:
    """A weight of the arrays that `qparams` has for it, in its own axes."""
    # Packed nibbles lie in the order of groups; int8 lies as the weight does.
    if bits == 4:
        integers = unpack(integers, layout.axis, layout.shape[layout.axis])
    else:
        integers = integers.transpose(layout.order).reshape(layout.shape)
    groups = [layout.groups if a == layout.axis else n for a, n in enumerate(layout.shape)]
    if layout.groups == 1 and scale.size == np.prod(groups):  # a scale for each channel
        scale = scale.reshape(groups)
    elif scale.ndim < len(groups):  # or one for each layer
        scale = scale.reshape(*scale.shape, *[1] * (len(groups) - scale.ndim))
    scale = np.broadcast_to(scale, groups).astype(np.float32)
    return Stored(integers, scale, layout, bits, layout.inverse)
