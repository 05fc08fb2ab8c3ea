"""The native float32 depthwise convolution is NumPy's, in every geometry and number of threads."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxquant import native
from jaxquant.graph.trace import trace
from jaxquant.run.float_forms import evaluate_float
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

NHWC = ("NHWC", "HWIO", "NHWC")


def reference(x, kernel, strides, padding, dilation) -> np.ndarray:
    """In float64, a window at a time."""
    x = np.pad(
        x.astype(np.float64), ((0, 0), *((max(p, 0), max(q, 0)) for p, q in padding), (0, 0))
    )
    cut = [slice(max(-p, 0), size - max(-q, 0)) for (p, q), size in zip(padding, x.shape[1:3])]
    x = x[:, cut[0], cut[1]]
    reach = [(taps - 1) * d for taps, d in zip(kernel.shape[:2], dilation)]
    rows = range(0, x.shape[1] - reach[0], strides[0])
    columns = range(0, x.shape[2] - reach[1], strides[1])
    out = np.zeros((x.shape[0], len(rows), len(columns), x.shape[3]))
    for (r, i), (c, j) in itertools.product(enumerate(rows), enumerate(columns)):
        window = x[:, i : i + reach[0] + 1 : dilation[0], j : j + reach[1] + 1 : dilation[1]]
        out[:, r, c] = np.einsum("nhwc,hwc->nc", window, kernel[:, :, 0].astype(np.float64))
    return out


@pytest.mark.parametrize("channels", [1, 3, 16, 23, 64, 100])
@pytest.mark.parametrize(
    ("size", "taps", "strides", "padding", "dilation"),
    [
        ((9, 8), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1)),
        ((9, 8), (5, 3), (2, 3), ((0, 3), (4, 0)), (1, 1)),
        ((9, 8), (3, 2), (1, 2), ((2, 2), (1, 0)), (2, 3)),
        ((9, 8), (3, 3), (1, 1), ((-1, 2), (0, -2)), (1, 1)),
        ((2, 3), (5, 5), (1, 1), ((4, 4), (9, 9)), (1, 1)),  # windows wholly outside
        ((2, 3), (5, 5), (1, 1), ((2, 2), (2, 2)), (3, 1)),  # none fits
        ((1, 1), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1)),
    ],
)
def test_values_are_those_of_numpy(channels, size, taps, strides, padding, dilation):
    rng = np.random.default_rng(channels)
    x = rng.normal(size=(2, *size, channels)).astype(np.float32)
    kernel = rng.normal(size=(*taps, 1, channels)).astype(np.float32)
    window = {"strides": strides, "padding": padding, "dilation": dilation}
    got = jax.jit(lambda x, k: native.float_depthwise(x, k, **window))(x, kernel)
    want = reference(x, kernel, strides, padding, dilation)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_many_rows_on_several_threads_and_an_empty_batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 60, 50, 48)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 1, 48)).astype(np.float32)
    padding = ((1, 1), (1, 1))
    run = jax.jit(lambda x, k: native.float_depthwise(x, k, padding=padding))
    want = reference(x, kernel, (1, 1), padding, (1, 1))
    np.testing.assert_allclose(run(x, kernel), want, rtol=1e-4, atol=1e-4)
    assert run(x[:0], kernel).shape == (0, 60, 50, 48)


def test_values_that_are_not_finite_stay_in_their_windows():
    x = np.ones((1, 8, 8, 20), np.float32)
    x[0, 0, 0, 3], x[0, 7, 7, 17] = np.nan, np.inf
    run = jax.jit(lambda x, k: native.float_depthwise(x, k, padding=((1, 1), (1, 1))))
    out = np.asarray(run(x, np.ones((3, 3, 1, 20), np.float32)))
    assert np.argwhere(np.isnan(out)).tolist() == [[0, i, j, 3] for i in (0, 1) for j in (0, 1)]
    assert np.argwhere(np.isinf(out)).tolist() == [[0, i, j, 17] for i in (6, 7) for j in (6, 7)]


def test_under_vmap():
    x = np.random.default_rng(0).normal(size=(3, 1, 6, 5, 17)).astype(np.float32)
    kernel = np.ones((3, 3, 1, 17), np.float32)
    together = jax.jit(jax.vmap(lambda x: native.float_depthwise(x, kernel)))(x)
    for part, whole in zip(x, together, strict=True):
        np.testing.assert_array_equal(native.float_depthwise(part, kernel), whole)


def test_a_sharded_model_takes_what_xla_can_shard():
    kernel = np.ones((3, 3, 1, 8), np.float32)

    def net(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=8
        )

    x = np.random.default_rng(0).normal(size=(8, 6, 6, 8)).astype(np.float32)
    graph = trace(net, kernel, (x,))
    run = jax.jit(lambda k, x: evaluate_float(graph, k, [x]).read(graph.outputs[0]))
    assert "jaxquant_float_depthwise" in run.lower(kernel, x).as_text()
    sharding = NamedSharding(Mesh(np.array(jax.devices()), "d"), PartitionSpec("d"))
    parts = jax.device_put(x, sharding)
    assert "jaxquant_float_depthwise" not in run.lower(kernel, parts).as_text()
    np.testing.assert_allclose(run(kernel, parts), net(kernel, x), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x, kernel = jnp.ones((1, 4, 4, 6)), jnp.ones((3, 3, 1, 6))
    with pytest.raises(ValueError, match=r"float32\[1, 4, 4, 6\] and float32\[3, 3, 6, 1\]"):
        native.float_depthwise(x, kernel.reshape(3, 3, 6, 1))
    with pytest.raises(ValueError, match="bfloat16"):
        native.float_depthwise(x.astype(jnp.bfloat16), kernel)
