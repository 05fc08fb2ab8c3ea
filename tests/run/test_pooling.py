"""Max pools on integers: the same bits as pooling the floats first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.graph.trace import trace
from jaxquant.run import pooling
from tests.native.cases import needs_kernels

pytestmark = pytest.mark.optimized

NHWC = ("NHWC", "HWIO", "NHWC")
WINDOWS: dict[str, tuple[tuple[int, int], tuple[int, int], Any]] = {
    "3x3 by 2": ((3, 3), (2, 2), ((0, 1), (1, 0))),
    "same": ((3, 3), (1, 1), ((1, 1), (1, 1))),
    "2x2": ((2, 2), (2, 2), ((0, 0), (0, 0))),
    "uneven": ((1, 3), (3, 2), ((0, 0), (2, 1))),
    "large": ((9, 9), (4, 4), ((4, 4), (4, 4))),  # more elements than run as slices
    "no padding left": ((5, 5), (3, 3), ((0, 0), (0, 0))),
}


def pool(x: jax.Array, window: Any, strides: Any, padding: Any, **options: Any) -> jax.Array:
    low = -jnp.inf if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).min
    initial = np.asarray(low, x.dtype)
    pads = ((0, 0), *padding, (0, 0))
    return lax.reduce_window(
        x, initial, lax.max, (1, *window, 1), (1, *strides, 1), pads, **options
    )


def numpy_pool(x: np.ndarray, window: Any, strides: Any, padding: Any) -> np.ndarray:
    padded = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-128)
    views = np.lib.stride_tricks.sliding_window_view(padded, window, (1, 2))
    return views[:, :: strides[0], :: strides[1]].max((-2, -1))


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_int8_pool_equals_numpy(case: str, dtype: Any):
    x = np.random.default_rng(0).integers(-128, 128, (2, 11, 12, 5)).astype(np.int8)
    graph = trace(lambda p, x: pool(x, *WINDOWS[case]), {}, (jnp.asarray(x, dtype),))
    (eqn,) = (e for e in graph.equations if e.name == "reduce_window_max")
    got = jax.jit(lambda x: pooling.max_pool(x, eqn))(x)
    np.testing.assert_array_equal(got, numpy_pool(x, *WINDOWS[case]))


def test_a_window_larger_than_the_input_gives_nothing():
    graph = trace(
        lambda p, x: pool(x, (3, 3), (1, 1), ((0, 0), (0, 0))), {}, (jnp.zeros((1, 2, 5, 4)),)
    )
    (eqn,) = (e for e in graph.equations if e.name == "reduce_window_max")
    assert pooling.max_pool(jnp.zeros((1, 2, 5, 4), jnp.int8), eqn).shape == (1, 0, 3, 4)


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def pooled_net(params: Any, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(conv(x, params["stem"]))
    x = pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    return conv(x, params["body"]) + conv(x, params["side"])


def branching_net(params: Any, x: jax.Array) -> jax.Array:
    """The pooled tensor is read by another convolution, on its own scale, and in float."""
    x = jax.nn.relu(conv(x, params["stem"]))
    y = conv(pool(x, (3, 3), (1, 1), ((1, 1), (1, 1))), params["body"])
    return y + conv(x, params["side"]) + x[..., :4]


def float_too(params: Any, x: jax.Array) -> jax.Array:
    x = pool(jax.nn.relu(conv(x, params["stem"])), (2, 2), (2, 2), ((0, 0), (0, 0)))
    return conv(x, params["body"]) + jnp.mean(x, (1, 2, 3), keepdims=True)


def dilated_net(params: Any, x: jax.Array) -> jax.Array:
    """A window may lie between the elements of a dilated input: there is no integer for -inf."""
    x = conv(x, params["stem"])
    x = pool(x, (1, 1), (1, 1), ((0, 0), (0, 0)), base_dilation=(1, 2, 1, 1))
    return conv(jnp.maximum(x, -1.0), params["body"])


def quantized(net: Any) -> Any:
    rng = np.random.default_rng(1)
    shapes = {"stem": (3, 3, 3, 8), "body": (3, 3, 8, 4), "side": (1, 1, 8, 4)}
    params = {
        k: jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1])), jnp.float32)
        for k, s in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(2, 10, 10, 3)), jnp.float32)
    qparams, qapply = jaxquant.quant_post(params, net, [x], progress=False, recover=())
    return qparams, qapply.with_backend("xla"), x


@pytest.mark.parametrize(("net", "pools"), [(pooled_net, 1), (branching_net, 1), (float_too, 0),
                                            (dilated_net, 0)])  # fmt: skip
def test_pools_on_integers_give_the_same_bits(net: Any, pools: int, monkeypatch: Any):
    qparams, qapply, x = quantized(net)
    assert len(qapply.program(x).early) == pools
    text = jax.jit(qapply).lower(qparams, x).as_text()
    assert ("reduce_window" in text) == (not pools)
    got = np.asarray(qapply(qparams, x))
    monkeypatch.setattr("jaxquant.run.program.find_early_pools", lambda *_: {})
    fresh, late, _ = quantized(net)
    np.testing.assert_array_equal(got, late(fresh, x))


@needs_kernels
@pytest.mark.parametrize("net", [pooled_net, branching_net])
def test_the_native_call_writes_what_is_pooled(net: Any):
    qparams, xla, x = quantized(net)
    native = xla.with_backend("native")
    np.testing.assert_array_equal(native(qparams, x), xla(qparams, x))
    if net is pooled_net:
        text = jax.jit(native).lower(qparams, x).as_text()
        assert "tensor<2x10x10x8xf32>" not in text
