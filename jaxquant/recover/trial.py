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
        off = self._off(*self._quantized(grid, factors))
        return float(np.sum(np.square(off, dtype=np.float64)))  # of any float32

    def noise(self, grid: IntegerRange, factors: np.ndarray | None = None) -> float:
        """How much of a row of outputs is noise, in the mean over the rows, as a power.

        It is a row's Σ (y - ŷ)² over the sum of its Σ y² and that of the middle row: so large rows
        do not hide what the others lose, which matters where rows are normalized behind the site,
        and rows of next to nothing do not count.  The arguments are those of `error`.
        """
        return self._noise(self._off(*self._quantized(grid, factors)))

    def noise_by_row(self) -> float:
        """The same where each row has a scale and a zero point of its own, for its range."""
        low, high = (
            reduced(self.inputs, axis=(1, 2), keepdims=True, initial=0.0)
            for reduced in (np.min, np.max)
        )

        # A row of zeros has a step all the same; any will do.
        steps = np.where(high > low, high - low, 255.0) / 255.0
        zero_points = -128 - np.rint(low / steps)
        integers = np.clip(np.rint(self.inputs / steps) + zero_points, -128, 127) - zero_points
        return self._noise(self._off(integers, self.weight, steps.reshape(1, -1, 1)))

    def _noise(self, off: np.ndarray) -> float:
        noise, signal = (
            np.sum(np.square(x, dtype=np.float64), axis=(0, 2)) for x in (off, self._wanted)
        )
        if not signal.any():
            return 0.0
        # See `noise`: rows of next to nothing weigh less than the middle one.
        signal = signal + np.median(signal)
        return float(np.mean(noise[signal > 0] / signal[signal > 0]))

    def _quantized(
        self, grid: IntegerRange, factors: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What `_off` takes, of inputs on a grid."""
        divided = np.asarray(grid.step if factors is None else grid.step * factors)
        weight = self.weight if factors is None else self.weight * factors[:, :, None]
        integers = np.rint(self.inputs * (1 / divided).astype(np.float32))
        integers = np.clip(integers, np.float32(grid.lowest), np.float32(grid.highest))
        return integers, weight, np.asarray(grid.step)

    def _off(self, integers: np.ndarray, weight: np.ndarray, step: np.ndarray) -> np.ndarray:
        """y - ŷ, [G, R, O].

        Args:
          integers: of the inputs, [R, G, K].
          weight: before it is quantized, [G, K, O].
          step: what an integer of an input is worth, of a shape that goes with [G, R, O].
        """
        # The weight is rounded anew, since factors change its largest value and so its scale.
        summed = 1 if self.per_channel else (0, 1, 2)
        threshold = np.abs(weight).max(axis=summed, keepdims=True, initial=0.0)
        scale = np.where(threshold > 0, threshold, 127.0) / 127.0
        int8 = np.rint(weight / scale).astype(np.float32)
        worth = (step * scale * self.gains[:, None, :]).astype(np.float32)
        off = self._wanted - _product(integers, int8) * worth
        if self.centred:
            off = off - off.mean(axis=1, keepdims=True, dtype=np.float64)
        return off

    @functools.cached_property
    def _wanted(self) -> np.ndarray:
        """float32 [G, R, O]"""
        return _product(self.inputs, (self.weight * self.gains[:, None, :]).astype(np.float32))


def _product(inputs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """[R, G, K] times [G, K, O]: [G, R, O]"""
    return np.matmul(inputs.transpose(1, 0, 2), weight)
