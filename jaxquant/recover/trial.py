"""What int8 costs a site at its own outputs, tried on rows of what it reads in the float model.

Letters as in `jaxquant.recover.product`: `R` rows, `G` groups, `K` products a sum, `O` = C/G output
channels a group.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np


class IntegerRange(NamedTuple):
    """The integers of an input less its zero point: from `lowest` to `highest`, worth `step`."""

    step: float
    lowest: float
    highest: float


@dataclasses.dataclass(frozen=True)
class Trial:
    """One site.

    Attributes:
      inputs: float32 [R, G, K].
      weight: float64 [G, K, O].
      gains: float64 [G, O], what the epilogue multiplies the outputs by.
      per_channel: the weight has a scale for each output channel, not one for all.
      centred: the mean error of each channel does not count: bias correction takes it away.
    """

    inputs: np.ndarray
    weight: np.ndarray
    gains: np.ndarray
    per_channel: bool
    centred: bool

    def error(self, grid: IntegerRange, factors: np.ndarray | None = None) -> float:
        """Σ (y - ŷ)² over rows and channels.

        Args:
          grid: of the input.
          factors: [G, K], what the inputs are divided by and the weight is multiplied by.
        """
        divided = np.asarray(grid.step if factors is None else grid.step * factors)
        weight = self.weight if factors is None else self.weight * factors[:, :, None]
        integers = np.rint(self.inputs * (1 / divided).astype(np.float32))
        integers = np.clip(integers, np.float32(grid.lowest), np.float32(grid.highest))
        summed = 1 if self.per_channel else (0, 1, 2)
        threshold = np.abs(weight).max(axis=summed, keepdims=True, initial=0.0)
        scale = np.where(threshold > 0, threshold, 127.0) / 127.0
        int8 = np.rint(weight / scale).astype(np.float32)
        worth = (grid.step * scale * self.gains[:, None, :]).astype(np.float32)  # [G, 1, O]
        off = self._wanted - _product(integers, int8) * worth
        if self.centred:
            off = off - off.mean(axis=1, keepdims=True, dtype=np.float64)
        return float(np.sum(np.square(off, dtype=np.float64)))  # of any float32

    @functools.cached_property
    def _wanted(self) -> np.ndarray:
        """float32 [G, R, O]"""
        return _product(self.inputs, (self.weight * self.gains[:, None, :]).astype(np.float32))


def _product(inputs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[R, G, K] times [G, K, O]: [G, R, O]"""
    return np.matmul(inputs.transpose(1, 0, 2), weight)
