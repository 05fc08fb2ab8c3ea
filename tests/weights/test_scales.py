"""Scales of groups: rounded to bfloat16, and what becomes of the weights at the ends of them."""

import numpy as np
import pytest

from jaxquant.plan.groups import group_layout
from jaxquant.weights.groups import quantize_groups, unpack


@pytest.mark.parametrize("bits", [8, 4])
def test_no_weight_is_clipped_by_the_rounding_of_its_scale(bits):
    """It is off by no more than the half of a step that any weight may be."""
    largest = 2 ** (bits - 1) - 1
    weight = np.random.default_rng(0).uniform(1, 2, (4000, 1))
    layout = group_layout(weight.shape, (0,), 1)
    integers, scale = quantize_groups(weight, layout, bits)
    if bits == 4:
        integers = unpack(integers, layout.axis, 1)
    else:
        assert (integers == largest).all()
    scale = scale.astype(np.float64)
    assert (np.abs(integers * scale - weight) <= scale / 2).all()


@pytest.mark.parametrize("weight_dtype", ["int", "nf4"])
def test_the_least_and_the_largest_floats_have_scales(weight_dtype):
    ends = np.array([[1e-40], [np.finfo(np.float32).max]])
    _, scale = quantize_groups(ends, group_layout((2, 1), (0,), 32), 4, weight_dtype)
    assert float(scale[0, 0]) == 2.0**-126
    assert np.isfinite(scale.astype(np.float32)).all()
