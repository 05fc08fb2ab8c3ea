"""The grids that a tensor with factors for its channels may have."""

from __future__ import annotations

import numpy as np
import pytest

from jaxquant.plan.grid import Grid, make_grid
from jaxquant.recover.divisible import Seen
from jaxquant.recover.factors import candidate_grids


def test_zero_points_of_the_divided_channels_are_tried():
    """A channel of a GELU's ends that is 100 times larger, and one that is never positive."""
    low, high = np.full((2, 9), -0.17, np.float32), np.full((2, 9), 3.0, np.float32)
    high[:, 4] *= 100
    own = Grid(300.17 / 255, -128)
    middle = make_grid(3.0, -0.17, 3.0).zero_point
    first, *others = candidate_grids(own, Seen(low, high, ()))
    assert first == own
    assert {grid.zero_point for grid in others} == {middle - 1, middle}
    for grid in others:  # the largest channel is covered
        assert grid.scale * (127 - grid.zero_point) == pytest.approx(own.scale * 255)
    low[:, 5], high[:, 5] = -300, 0
    both = candidate_grids(Grid(300 / 127, 0), Seen(low, high, ()))
    assert [grid.zero_point for grid in both] == [0, middle]
    assert both[1].scale == pytest.approx(300 / 127 * 128 / 14)  # to -300 with 14 steps
    zero = np.zeros((2, 3), np.float32)
    assert candidate_grids(own, Seen(zero, zero, ())) == [own]
