"""Integers and scales of weights, against the reference."""

from __future__ import annotations

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np

from jaxquant.weights.integers import quantize_weight, weight_scale
from tests import reference

settings = hypothesis.settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    seed, exponent = draw(st.integers(0, 10**6)), draw(st.integers(-60, 60))
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape) * rng.integers(0, 2, shape) * 2.0**exponent
    axes = draw(st.sets(st.integers(0, len(shape) - 1)) if shape else st.just(set()))
    return weight.astype(np.float32), tuple(sorted(axes))


@settings
@hypothesis.given(weights())
def test_equals_the_reference(case):
    weight, axes = case
    scale = weight_scale(weight.astype(np.float64), axes)
    int8 = quantize_weight(weight.astype(np.float64), axes, scale)
    want, want_scale = reference.quantize_weight(weight, axes)
    assert int8.dtype == np.int8
    np.testing.assert_array_equal(int8, want)
    np.testing.assert_array_equal(scale, want_scale if axes else want_scale.reshape(()))


def test_ties_round_to_even():
    weight = np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    assert quantize_weight(weight, (0,), weight_scale(weight, (0,))).tolist() == [
        [127, 0, 2, 2, 0, -2, 126]
    ]
