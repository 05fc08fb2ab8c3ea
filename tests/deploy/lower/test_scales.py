"""What the integers of a tensor are worth in each of its layers."""

from __future__ import annotations

import numpy as np

from jaxquant.deploy.lower.scales import Scales
from jaxquant.plan.plan import Plan, TensorPlan


def test_a_tensor_may_be_divided_in_one_layer_alone():
    layers = [
        TensorPlan("w/input", "w/input", 1.0, 0.5, 0, channels=(1,)).in_layer((0,)),
        TensorPlan("w/input", "w/input", 1.0, 0.25, -3).in_layer((1,)),
    ]
    plan = Plan((), tuple(layers), (), "channel_wise_abs_max", "abs_max")
    scales = Scales(plan, {"w/input": {"scale": np.float32([[0.5, 0.125], [0.25, 0.25]])}})
    divided, whole = "w/input[0]", "w/input[1]"
    assert [scales.is_divided(entry) for entry in (divided, whole)] == [True, False]
    assert [scales.scale(entry) for entry in (divided, whole)] == [0.5, 0.25]
    assert scales.divisors(divided).tolist() == [1.0, 0.25]
    assert scales.zero_point(whole) == -3
