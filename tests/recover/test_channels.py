"""How far a channel may go beyond what calibration showed."""

from __future__ import annotations

import numpy as np
import pytest

from jaxquant.recover.channels import HEADROOM, reach


def test_an_even_channel_gets_the_least_headroom():
    peaks = np.linspace(0.99, 1, 64)[:, None]
    np.testing.assert_allclose(reach(peaks), [HEADROOM])


def test_the_tail_of_a_power_law_is_found():
    """Of a Pareto tail with exponent 4, one sample in 100 000 lies beyond 10**(5 / 4)."""
    rng = np.random.default_rng(0)
    peaks = (1 - rng.random((64, 2000))) ** (-1 / 4)
    found = np.median(reach(peaks))
    assert 0.6 < found / 10 ** (5 / 4) < 1.6


@pytest.mark.parametrize("samples", [64, 1024])
@pytest.mark.parametrize("one_sided", [False, True])
def test_a_normal_tail_is_not_taken_for_a_power_law(samples: int, one_sided: bool):
    """Nearly all lie within 4.4 deviations; each channel gets about that, and no bit more."""
    x = np.random.default_rng(0).normal(size=(samples, 128))
    found = reach(np.maximum(x, 0) if one_sided else np.abs(x))
    assert np.quantile(found, 0.05) > 3.7
    assert np.quantile(found, 0.95) < 2 * 4.4 * 1.1


def test_a_channel_seen_in_a_few_samples_alone_is_not_known():
    peaks = np.zeros((64, 2))
    peaks[:8, 0] = 1
    peaks[:9, 1] = 1
    np.testing.assert_allclose(reach(peaks), [np.inf, HEADROOM])


def test_one_sample_tells_nothing():
    assert np.isinf(reach(np.ones((1, 3)))).all()
