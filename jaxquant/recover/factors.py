"""The factors that the channels of a tensor are divided by: tried, and chosen by their error.

See `jaxquant.recover.equalization` for what is tried and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.plan.grid import SMALLEST_SCALE, Grid, make_grid
from jaxquant.plan.inputs import along_weight
from jaxquant.plan.plan import TensorPlan
from jaxquant.recover.channels import reach
from jaxquant.recover.divisible import Divisible, Seen
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.trial import IntegerRange, Trial

_WORTH = 0.9  # an equalization is worth it where the error falls to this part
_SMALLEST = 1 / 64  # of the middle channel's range: the least range of a channel


class Divided(NamedTuple):
    """How a tensor is quantized after dividing.

    Attributes:
      factors: float64 of the tensor's rank, of size 1 but along its input channels: what the
        channels are divided by.
      grid: what the divided tensor is quantized on.
    """

    factors: np.ndarray
    grid: Grid


class ReadingSite:
    """A site that reads a tensor, tried with factors for its input channels, flattened [I]."""

    def __init__(self, tensor: Divisible, product: SiteProduct, trial: Trial):
        self._trial = trial
        assert product.site.weight is not None
        shape = product.graph.shape(product.site.weight)
        # Numbers in place of factors: where each lies along the weight tells which channel it is.
        numbers = np.arange(np.prod(tensor.sizes), dtype=np.int64).reshape(tensor.sizes)
        laid = along_weight(product.site, shape, numbers)
        # [G, K], the input channel of each product
        self._channel = product.matrix(np.broadcast_to(laid, shape))[:, :, 0]

    def largest(self, channels: int) -> np.ndarray:
        """[I], the largest |weight| behind each input channel."""
        # Several products may read one channel: the largest of their weights counts.
        largest = np.zeros(channels)
        np.maximum.at(largest, self._channel, np.abs(self._trial.weight).max(axis=2))
        return largest

    def error(self, grid: IntegerRange, factors: np.ndarray | None) -> float:
        return self._trial.error(grid, None if factors is None else factors[self._channel])

    def noise(self, grid: IntegerRange, factors: np.ndarray | None) -> float:
        return self._trial.noise(grid, None if factors is None else factors[self._channel])

    def noise_by_row(self) -> float:
        return self._trial.noise_by_row()


class Tried(NamedTuple):
    """A tensor in one layer: its plan, what the float model showed of it, the sites behind it."""

    plan: TensorPlan
    seen: Seen
    readers: Sequence[ReadingSite]

    @property
    def own(self) -> Grid:
        """The grid that it has."""
        return Grid(self.plan.scale, self.plan.zero_point)

    def error(self, grid: Grid, factors: np.ndarray | None) -> float:
        """What the sites behind it are off on a grid, divided by factors or by none."""
        return sum(reader.error(_input_grid(grid), factors) for reader in self.readers)

    def noise(self, grid: Grid, factors: np.ndarray | None) -> float:
        """How much of their outputs is noise then, see `jaxquant.recover.trial.Trial.noise`."""
        noise = [reader.noise(_input_grid(grid), factors) for reader in self.readers]
        return sum(noise) / len(noise)

    def noise_by_row(self) -> float:
        """The same where each row has a scale of its own."""
        return sum(reader.noise_by_row() for reader in self.readers) / len(self.readers)


def choose(tried: Sequence[Tried], alphas: Sequence[float]) -> list[Divided]:
    """The factors [I] and the grids of least error; [] where none is better than none.

    Args:
      tried: a tensor; of layers that have a weight in common, that of each: their factors are the
        same, and each keeps its grid.  Where one alone is not symmetric, other zero points are
        tried too.
      alphas: the exponents to try.
    """

    own = [each.own for each in tried]
    least = _WORTH * sum(each.error(grid, None) for each, grid in zip(tried, own, strict=True))
    readers = [reader for each in tried for reader in each.readers]
    channels = tried[0].seen.high.shape[1]
    largest = np.max([reader.largest(channels) for reader in readers], axis=0)
    # A channel whose weights are all zero may be divided by anything that is finite.
    largest = np.where(largest > 0, largest, largest.max(initial=0.0) or 1.0)
    candidates = [own]
    if len(tried) == 1 and not tried[0].plan.symmetric:
        candidates = [[grid] for grid in candidate_grids(own[0], tried[0].seen)]
    best: list[Divided] = []
    for grids in candidates:
        ranges = np.max(
            [_ranges(_input_grid(g), each.seen) for g, each in zip(grids, tried, strict=True)],
            axis=0,
        )
        # A step is no larger than the tensor's was, unless the channel reaches further on this side
        wider = max(before.scale / now.scale for before, now in zip(own, grids, strict=True))
        most = np.maximum(ranges, wider)
        smallest = max(SMALLEST_SCALE / grid.scale for grid in grids)
        for alpha in alphas:
            # What the paper balances: the channel's range and that of the weights behind it.
            factors = ranges**alpha / largest ** (1 - alpha)
            factors = factors * np.max(ranges / factors)  # no channel beyond the grid
            factors = np.clip(factors, smallest, most)
            errors = (each.error(grid, factors) for each, grid in zip(tried, grids, strict=True))
            if (found := sum(errors)) < least:
                best, least = [Divided(factors, grid) for grid in grids], found
    return best


def _input_grid(grid: Grid) -> IntegerRange:
    # With zero at 0: the grid's ends are as far from it as the zero point leaves.
    return IntegerRange(grid.scale, -128.0 - grid.zero_point, 127.0 - grid.zero_point)


def candidate_grids(own: Grid, seen: Seen) -> list[Grid]:
    """The tensor's own grid, and those with the zero points that fit its divided channels.

    Each channel divided by its width lies in [-r, 1 - r].  One zero point covers all channels, as
    far as they reach to either side; another is that of the middle channel, for where one that is
    unlike the others (all negative beside a GELU's) would cost them half of their steps.  The scale
    is the one with which the tensor's own range is covered, on the side where that takes more.
    """
    # Channels that were divided reach differently far to both sides than the tensor did.
    low, high = -seen.low.min(axis=0), seen.high.max(axis=0)
    width = low + high
    below = (low / np.where(width > 0, width, 1.0))[width > 0].astype(np.float64)
    if not below.size:
        return [own]
    middle = float(np.median(below))
    # One zero point for the widest ends, and one for the channel in the middle.
    ends = {(float(below.max()), 1 - float(below.min())), (middle, 1 - middle)}
    points = {make_grid(max(end), -end[0], end[1]).zero_point for end in ends} - {own.zero_point}
    there = _input_grid(own)
    grids = [own]
    for zero_point in sorted(points):
        here = _input_grid(Grid(own.scale, zero_point))
        # A grid with another zero point has to reach as far as the tensor's own on both sides.
        wider = max(
            there.highest / here.highest if here.highest > 0 else 0.0,
            there.lowest / here.lowest if here.lowest < 0 else 0.0,
        )
        grids.append(Grid(own.scale * wider, zero_point))
    return grids


def _ranges(grid: IntegerRange, seen: Seen) -> np.ndarray:
    """[I], how much of a grid each channel may take up."""

    # Infinite where the grid has no room on that side and the channel reaches there.
    shown = np.maximum(
        seen.high / (grid.step * grid.highest) if grid.highest > 0 else 0.0,
        seen.low / (grid.step * grid.lowest) if grid.lowest < 0 else 0.0,
    )
    ranges = np.minimum(reach(shown), 1.0)
    # A channel with next to no range would get a factor that no weight can take.
    return np.maximum(ranges, _SMALLEST * np.median(ranges))
