"""The faster forms of float convolutions give what the convolutions give."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.calibration.sweep import Sweep, run_sweep
from jaxquant.graph import evaluate
from jaxquant.graph.model import FloatModel
from jaxquant.graph.trace import trace
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.observed import observed_tensors
from jaxquant.run.float_forms import fast_convolutions

pytestmark = pytest.mark.optimized

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any], bool]] = {
    "depthwise": ((2, 9, 8, 6), (3, 3, 1, 6), {"feature_group_count": 6}, True),
    "depthwise, strided": (
        (2, 9, 8, 6), (5, 3, 1, 6),
        {"feature_group_count": 6, "window_strides": (2, 3), "padding": ((2, 1), (0, -1))}, True),
    "1x1": ((2, 9, 8, 6), (1, 1, 6, 5), {"padding": "VALID"}, True),
    "1x1, strided": ((2, 9, 8, 6), (1, 1, 6, 5), {"window_strides": (2, 3)}, True),
    "1x1, padded": ((2, 9, 8, 6), (1, 1, 6, 5), {"padding": ((1, 1), (0, 0))}, False),
    "3x3": ((2, 9, 8, 6), (3, 3, 6, 5), {}, False),
    "two outputs a channel": ((2, 9, 8, 6), (3, 3, 1, 12), {"feature_group_count": 6}, False),
    "dilated": (
        (2, 9, 8, 6), (3, 2, 1, 6),
        {"feature_group_count": 6, "rhs_dilation": (2, 3), "window_strides": (2, 1)}, True),
    "transposed": ((2, 9, 8, 6), (3, 3, 1, 6),
        {"feature_group_count": 6, "lhs_dilation": (2, 2), "padding": ((1, 1), (0, 2))}, False),
    "window larger than the input": (
        (2, 2, 2, 6), (3, 3, 1, 6), {"feature_group_count": 6, "padding": "VALID"}, False),
    "channels first": ((2, 6, 9, 8), (5, 6, 1, 1), {"layout": NCHW}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("natively", [True, False])
def test_same_values(case: str, dtype: Any, natively: bool):
    shape, kernel_shape, options, is_faster = CASES[case]
    given = {"window_strides": (1, 1), "padding": "SAME", **options}
    layout = given.pop("layout", NHWC)

    def net(kernel: Any, x: Any) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, dimension_numbers=layout, **given)

    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, kernel_shape))
    graph = trace(net, kernel, (x,))
    found = fast_convolutions(graph, natively=natively)
    on_cpu = jax.default_backend() == "cpu"
    assert len(found) == int(is_faster and dtype == jnp.float32 and on_cpu)
    table = evaluate.float_table(graph.equations, found)
    env = evaluate.evaluate(graph, {graph.leaves[0]: kernel}, [x], table)
    expected = net(kernel, x)
    got = evaluate.outputs(env)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_sweep_observes_the_same():
    """The tensors, the counts but for values on the edge of a bin, the thresholds."""
    rng = np.random.default_rng(1)
    params = {
        "depthwise": jnp.asarray(rng.normal(size=(3, 3, 1, 8)), jnp.float32),
        "pointwise": jnp.asarray(rng.normal(size=(1, 1, 8, 8)), jnp.float32),
    }

    def net(params: Any, x: Any) -> jax.Array:
        for _ in range(2):
            x = jax.nn.relu(
                lax.conv_general_dilated(x, params["depthwise"], (1, 1), "SAME",
                                         dimension_numbers=NHWC, feature_group_count=8)
            )  # fmt: skip
            x = lax.conv_general_dilated(
                x, params["pointwise"], (1, 1), "SAME", dimension_numbers=NHWC
            )
        return x

    x = rng.normal(size=(4, 8, 8, 8)).astype(np.float32)
    tensors_of = functools.partial(observed_tensors, config=QuantConfig())
    fast, plain = (
        run_sweep(Sweep(FloatModel(net, params), tensors_of, forms=forms), [(x,)])
        for forms in (fast_convolutions, evaluate.no_forms)
    )
    assert fast.tensors.keys() == plain.tensors.keys()
    for name, stats in fast.tensors.items():
        other = plain.tensors[name]
        assert stats.bin_width == other.bin_width
        assert np.abs(np.asarray(stats.counts) - np.asarray(other.counts)).sum() <= 4
