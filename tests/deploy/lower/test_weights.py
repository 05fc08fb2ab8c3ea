"""A site's epilogue folded into its weight."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxquant.deploy.lower.weights import make_weight

FLOATS = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
@hypothesis.given(
    st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=6), st.floats(2.0**-13, 8.0, width=32)
)
def test_is_worth_what_the_site_makes_of_its_sums(
    channels: list[tuple[float, float]], input_scale: float
):
    """`int8 * scale * input_scale` is the weight times the multiplier, and the bias stays whole."""
    multiplier, bias = np.asarray(channels).T
    int8 = np.tile(np.arange(-127, 128, 2, dtype=np.int8), (len(channels), 1))
    weight = make_weight(int8, 0, multiplier, bias, input_scale)
    steps = weight.bias_steps()
    assert steps is not None
    assert (weight.scale > 0).all()
    worth = weight.int8 * weight.scale[:, None].astype(np.float64) * input_scale
    # Half a step where the steps had to grow for the bias, or float32's rounding.
    room = 0.5 * weight.steps[:, None] + 1e-5 * np.abs(worth)
    grown = weight.steps > np.abs(multiplier) * 1.00001
    room = np.where(grown[:, None], room, 1e-5 * np.abs(worth) + 1e-30)
    assert (np.abs(worth - int8 * multiplier[:, None]) <= room).all()
    assert (np.abs(steps * weight.steps.astype(np.float64) - bias) <= 0.51 * weight.steps).all()


def test_a_multiplier_of_zero_makes_the_weight_zero():
    weight = make_weight(np.full((2, 3), 5, np.int8), 0, np.asarray([0.0, -1.0]), None, 0.5)
    assert weight.int8.tolist() == [[0, 0, 0], [-5, -5, -5]]
    assert weight.bias_steps() is None
