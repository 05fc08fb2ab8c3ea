"""The native search finds the thresholds that the search by XLA finds."""

from __future__ import annotations

import numpy as np
import pytest

from jaxquant import native
from jaxquant.calibration import kl
from jaxquant.calibration.search import search, validated
from tests.calibration.test_threshold import distributions, histogram
from tests.native.cases import needs_kernels

pytestmark = needs_kernels


def both(counts, width, abs_max=None, levels=127) -> tuple[np.ndarray, np.ndarray]:
    """By the native kernel, by XLA."""
    natively = kl.kl_threshold(counts, width, abs_max=abs_max, levels=levels)
    return natively, search(kl._SEARCHES["jaxquant"], counts, width, abs_max, levels)


@pytest.mark.parametrize("levels", [127, 255])
@pytest.mark.parametrize("with_abs_max", [False, True])
def test_on_distributions(levels, with_abs_max):
    found = [histogram(x) for x in distributions().values()]
    counts, widths, largest = map(np.stack, zip(*found, strict=True))
    natively, by_xla = both(counts, widths, largest if with_abs_max else None, levels)
    np.testing.assert_array_equal(natively, by_xla)
    assert len(set(natively)) > 6


@pytest.mark.parametrize("bins", [2, 3, 10, 130, 500])
def test_on_histograms_of_any_length(bins, rng):
    """Sparse and full ones, zero ones, all with levels of their own."""
    counts = rng.poisson(rng.choice([0.02, 0.5, 30], (40, 1)), (40, bins)) * rng.integers(1, 9)
    counts[:3] = 0
    counts[3] = np.eye(bins)[-1] * 2**40
    counts[4] = np.eye(bins)[0]
    levels = rng.integers(127, 256, 40)
    natively, by_xla = both(counts, 0.25, levels=levels)
    np.testing.assert_array_equal(natively, by_xla)
    assert not natively[:3].any()


def test_the_observer_takes_the_native_search(monkeypatch):
    calls = []
    found = native.kl_thresholds

    def spied(*args, **options):
        calls.append(len(args[0]))
        return found(*args, **options)

    monkeypatch.setattr(native, "kl_thresholds", spied)
    kl.kl_threshold(np.ones((20, 64)), 1.0)
    assert sum(calls) == 20
    assert len(calls) > 1
    monkeypatch.setattr(native, "runs_here", lambda: False)
    kl.kl_threshold(np.ones((20, 64)), 1.0)
    assert sum(calls) == 20


def test_what_does_not_fit_is_refused():
    hist = validated(np.ones((4, 8)), 1.0, None, 127)
    with pytest.raises(ValueError, match=r"\(4, 8\), \(3,\)"):
        native.kl_thresholds(hist.counts, hist.limit[:3], hist.levels, kl._WEIGHING)
    with pytest.raises(ValueError, match=r"N >= 2"):
        native.kl_thresholds(hist.counts[:, :1], hist.limit, hist.levels, kl._WEIGHING)
