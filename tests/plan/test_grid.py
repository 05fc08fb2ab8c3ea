"""The grid of a tensor: exact zero, whole range, zero point only where it gains."""

import hypothesis
import hypothesis.strategies as st
import pytest

from jaxquant.plan.grid import SMALLEST_SCALE, levels, make_grid

values = st.floats(-1e6, 1e6, width=32)


def test_closed_forms():
    assert make_grid(127.0, -127.0, 110.0) == (1.0, 0)
    assert make_grid(255.0, 0.0, 300.0) == (1.0, -128)
    assert make_grid(255.0, -300.0, 0.0) == (1.0, 127)
    assert make_grid(127.0, 0.0, 300.0, asymmetric=False) == (1.0, 0)
    assert make_grid(0.0, 0.0, 0.0) == (1.0, 0)
    assert make_grid(1e-45, 0.0, 1e-45).scale == SMALLEST_SCALE


@hypothesis.given(values, values, st.floats(0.01, 1.0))
def test_the_grid_holds_the_range_to_half_a_step(a, b, part):
    low, high = sorted((a, b))
    threshold = max(-low, high, 1e-3) * part
    scale, zero = make_grid(threshold, low, high)
    assert isinstance(zero, int)
    assert -128 <= zero <= 127
    ends = max(min(low, 0.0), -threshold), min(max(high, 0.0), threshold)
    for end in ends:
        code = min(max(round(end / scale) + zero, -128), 127)
        assert abs((code - zero) * scale - end) <= scale * 0.501
    assert scale <= threshold / 127 * (1 + 1e-9)


@hypothesis.given(st.floats(0.1, 10.0), st.floats(0.0, 0.79))
def test_levels_are_the_steps_between_zero_and_the_threshold(high, part):
    scale, _ = make_grid(high, -part * high, high)
    assert abs(levels(-part * high, high) - high / scale) <= 0.5 + 1e-6
    assert levels(-high, part * high) == pytest.approx(high / scale, abs=1.5)
    assert levels(-part * high, high, asymmetric=False) == 127
