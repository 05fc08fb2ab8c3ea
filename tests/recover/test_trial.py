"""The error that is tried is the one that int8 has."""

from __future__ import annotations

import numpy as np
import pytest

from jaxquant.recover.trial import IntegerRange, Trial
from jaxquant.weights.integers import quantize_weight, weight_scale


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_is_that_of_the_quantized_product(groups: int, per_channel: bool):
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 3, (20, groups, 6)).astype(np.float32)
    w = rng.normal(size=(groups, 6, 2))
    gains, e = rng.uniform(1, 2, (groups, 2)), rng.uniform(0.5, 1, (groups, 6))
    grid = IntegerRange(2 / 255, -20, 235)  # clips
    want = np.einsum("rgk,gko->rgo", x, w) * gains
    scaled = w * e[:, :, None]
    axes = (0, 2) if per_channel else ()
    scale = weight_scale(scaled, axes)
    int8 = quantize_weight(scaled, axes, scale)
    scale = scale.reshape(groups, 1, 2) if per_channel else scale
    kept = np.clip(np.rint(x / (grid.step * e)), -20, 235) * grid.step
    off = want - np.einsum("rgk,gko->rgo", kept, int8 * scale) * gains
    found = Trial(x, w, gains, per_channel, False).error(grid, e)
    assert found == pytest.approx((off**2).sum(), rel=1e-3)
    found = Trial(x, w, gains, per_channel, True).error(grid, e)
    assert found == pytest.approx(((off - off.mean(axis=0)) ** 2).sum(), rel=1e-3)


def test_without_factors_is_with_ones():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(9, 1, 4)).astype(np.float32), rng.normal(size=(1, 4, 3))
    trial, grid = Trial(x, w, np.ones((1, 3)), True, False), IntegerRange(0.01, -127, 127)
    assert trial.error(grid) == pytest.approx(trial.error(grid, np.ones((1, 4))))
