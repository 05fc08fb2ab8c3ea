"""Every way to choose thresholds: closed forms, the faults of the references, own observers."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.calibration import counting, histogram
from jaxquant.calibration import threshold as th
from jaxquant.calibration.observations import TensorStats
from jaxquant.calibration.observers import OBSERVERS, percentile

BUILT_IN = sorted(name for name, o in OBSERVERS.items() if o.keeps_histogram)


def stats_of(x: Any) -> TensorStats:
    state = counting.observe(jnp.asarray(x, jnp.float32))
    counts, width = histogram.to_numpy(state)
    low, high, largest = float(state.min), float(state.max), float(state.abs_max)
    return TensorStats(counts, width, low, high, largest, int(counts.sum()))


def chosen(name: str, x: Any, levels: int = 127) -> float:
    return float(OBSERVERS[name].threshold([stats_of(x)], [levels])[0])


def error(x: np.ndarray, threshold: float, levels: int, weight: float = 1.0) -> float:
    """Squared error of the quantizer, by its definition, with clipping weighing more."""
    x = np.abs(np.float64(x))
    step = threshold / levels
    rounding = np.where(x <= threshold, (np.rint(x / step) * step - x) ** 2, 0)
    return float(rounding.sum() + weight * (np.maximum(x - threshold, 0) ** 2).sum())


@pytest.mark.parametrize("name", BUILT_IN)
def test_constant_and_zero_tensors(name):
    textbook = name.startswith("KL:")  # they look at the histogram alone
    assert chosen(name, np.zeros(100)) <= (1e-30 if textbook else 0)
    constant = chosen(name, np.full(100, 5.0))
    assert constant == pytest.approx(5.0, rel=0.01 if textbook else 1e-3)


@pytest.mark.parametrize("name", [n for n in BUILT_IN if not n.startswith("KL:")])
def test_a_range_far_from_zero(name):
    """Paddle ignores the histogram's lower edge: an input in [5, 6] gets 0.9998."""
    x = np.random.default_rng(0).uniform(5, 6, 4096)
    assert 5.0 < chosen(name, x) <= 6.01


@pytest.mark.parametrize("name", ["emd", "mse", "auto", "ptf"])
def test_negative_values_count(name):
    """Paddle's mse and emd set them to zero first."""
    x = np.random.default_rng(0).normal(size=4096)
    assert chosen(name, -np.abs(x)) == chosen(name, np.abs(x)) > 1


def test_hist_never_falls_below_zero_and_reaches_the_maximum():
    """With percent 1.0 Paddle can return a negative threshold."""
    x = -np.abs(np.random.default_rng(0).normal(size=1000))
    (whole,) = percentile(1.0).threshold([stats_of(x)], [127])
    assert whole == pytest.approx(np.abs(x).max())
    (half,) = percentile(0.5).threshold([stats_of(x)], [127])
    assert half == pytest.approx(np.median(np.abs(x)), rel=0.01)


@pytest.mark.parametrize("percent", [0.0, 1.5, float("nan")])
def test_a_wrong_fraction_is_refused(percent):
    with pytest.raises(ValueError, match="percent is a fraction"):
        percentile(percent)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=25)
@hypothesis.given(
    st.builds(
        lambda seed, power: 100 * np.random.default_rng(seed).uniform(size=300) ** power,
        st.integers(0, 2**32 - 1),
        st.floats(0.2, 6),
    ),
    st.sampled_from((127, 200, 255)),
    st.sampled_from((("mse", 1.0), ("auto", 16.0))),
)
def test_the_least_error_of_all_candidates(x, levels, method):
    name, weight = method
    # Of a few values each could fall on a step by chance, at one of the thresholds below and at
    # none of the search's own: there are many.
    stats = stats_of(x)
    found = chosen(name, x, levels)
    # The search knows the bins, so it is compared on values at their centres.
    centres = np.repeat((np.arange(2048) + 0.5) * stats.bin_width, stats.counts.astype(int))
    centres = centres[centres > stats.bin_width]
    slack = weight * len(centres) * stats.bin_width**2
    bins = int(np.ceil(stats.abs_max / stats.bin_width))
    tried = np.linspace(1, bins, 60) * stats.bin_width
    best = min(error(centres, t, levels, weight) for t in tried)
    assert error(centres, found, levels, weight) <= best * 1.05 + slack


def test_emd_keeps_both_moments():
    x = np.abs(np.random.default_rng(0).normal(size=20000))
    found = chosen("emd", x)

    def moved(threshold: float) -> float:
        q = np.minimum(np.rint(x / threshold * 127), 127) * threshold / 127
        return abs(q.mean() - x.mean()) + abs(q.std() - x.std())

    assert moved(found) <= 1.1 * min(moved(t) for t in np.linspace(0.5, x.max(), 100)) + 1e-4


def test_ptf_takes_a_power_of_two():
    spike = np.append(np.random.default_rng(0).normal(size=100_000) * 0.1, 8.0)
    assert chosen("ptf", np.linspace(0, 8, 1000)) == 8.0
    assert chosen("ptf", np.append(np.tile(spike[:-1], 5), 8.0)) in (8.0, 4.0, 2.0, 1.0)
    dense = np.append(np.random.default_rng(0).normal(size=4_000_000) * 1.0, [8.0])
    assert chosen("ptf", dense) < 8.0


def test_avg_is_the_mean_over_samples_whatever_the_batches():
    params, x = {"w": jnp.eye(4)}, np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    found = []
    for batches in ([x], [x[:3], x[3:]]):
        _, qapply = jaxquant.quant_post(
            params, lambda p, x: x @ p["w"], batches, algo="avg", progress=False
        )
        found.append(qapply.plan.tensors[0].threshold)
    assert found == pytest.approx([np.abs(x).max(1).mean()] * 2, rel=1e-6)


def own(scale: float) -> jaxquant.Observer:
    return jaxquant.Observer(
        init=lambda: jnp.zeros(()),
        update=lambda state, x: jnp.maximum(state, scale * jnp.abs(x).max()),
        threshold=lambda states, levels: states,
    )


def test_an_observer_of_ones_own():
    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4)) * 3
    observer = own(0.5)
    apply_fn = lambda p, x: x @ p["w"]  # noqa: E731
    observations = jaxquant.calibrate(params, apply_fn, [x], algo=observer, progress=False)
    _, qapply = jaxquant.quantize(params, apply_fn, observations, algo=observer)
    assert qapply.plan.tensors[0].threshold == 1.5
    assert qapply.plan.algo == "custom"
    _, qapply = jaxquant.quantize(params, apply_fn, observations, algo="abs_max")
    assert qapply.plan.tensors[0].threshold == 3.0


def test_statistics_that_were_not_kept_are_refused():
    params, x = {"w": jnp.eye(4)}, jnp.ones((2, 4))
    apply_fn = lambda p, x: x @ p["w"]  # noqa: E731
    observations = jaxquant.calibrate(params, apply_fn, [x], algo=own(0.5), progress=False)
    for algo in ("avg", own(0.5)):
        with pytest.raises(ValueError, match=r"keeps statistics of its own.*jaxquant.calibrate"):
            jaxquant.quantize(params, apply_fn, observations, algo=algo)


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [([], "0 thresholds for 1"), ([-1.0], "threshold -1.0 for tensor 'w/input'"),
     ([float("nan")], "threshold nan")],
)  # fmt: skip
def test_wrong_thresholds_are_refused(thresholds, message):
    observer = jaxquant.histogram_observer(lambda stats, levels: thresholds)
    with pytest.raises(ValueError, match=message):
        jaxquant.quant_post(
            {"w": jnp.eye(4)}, lambda p, x: x @ p["w"], [jnp.ones((2, 4))], algo=observer,
            progress=False)  # fmt: skip


def test_observers_run_under_strict_promotion_and_in_bfloat16():
    params = {"w": jnp.eye(4, dtype=jnp.bfloat16)}
    x = jax.random.normal(jax.random.key(0), (6, 4), jnp.bfloat16)
    _, qapply = jaxquant.quant_post(
        params, lambda p, x: x @ p["w"], [x], algo="avg", progress=False
    )
    want = np.abs(np.asarray(x, np.float32)).max(1).mean()
    assert qapply.plan.tensors[0].threshold == pytest.approx(want, rel=1e-6)


def test_thresholds_stay_within_the_range():
    x = np.random.default_rng(0).gamma(1.0, size=5000)
    for name in BUILT_IN:
        assert 0 < chosen(name, x, 255) <= x.max() * (1.001 if name.startswith("KL:") else 1 + 1e-6)
    assert th.auto_threshold(stats_of(x).counts, 1.0) > 0
