import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.training import TrainingError
from experiments.training.schedules import warmup_cosine

STEPS = jnp.arange(502)  # always as many: a new shape would be compiled anew


@settings(deadline=None)
@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(1e-4, 10))
def test_it_rises_to_the_peak_and_falls_to_zero(steps, share, peak):
    warmup = int(share * steps)
    rates = np.asarray(warmup_cosine(peak, steps, warmup)(STEPS))[: steps + 2]
    rising, falling = rates[: warmup + 1], rates[warmup:]
    assert (np.diff(rising) >= 0).all()
    assert (np.diff(falling) <= 0).all()
    assert (rates[:steps] > 0).all()
    np.testing.assert_allclose(rates[warmup], peak, rtol=1e-6)
    np.testing.assert_allclose(rates[steps:], 0, atol=1e-6 * peak)


def test_it_is_its_formula():
    rate = warmup_cosine(0.2, steps=10, warmup_steps=4)
    np.testing.assert_allclose(rate(0), 0.05, rtol=1e-6)
    np.testing.assert_allclose(rate(7), 0.1, rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(TrainingError, match=r"warmup of 5 steps in a run of 5.*warmup_epochs"):
        warmup_cosine(0.1, steps=5, warmup_steps=5)
    with pytest.raises(TrainingError, match="should be positive"):
        warmup_cosine(0.0, steps=5)
