"""The int8 operations on a GPU, against the NumPy reference; skipped where there is none."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import reference
from tests.contractions import int8_conv, int8_dot

pytestmark = [pytest.mark.optimized, pytest.mark.gpu]

# name -> input [N, H, W, C], kernel [h, w, C / groups, O], strides, groups
CONVOLUTIONS = {
    "3x3": ((2, 9, 9, 16), (3, 3, 16, 32), 1, 1),
    "strided": ((2, 15, 15, 3), (7, 7, 3, 64), 2, 1),
    "odd channels": ((2, 7, 7, 5), (3, 3, 5, 7), 1, 1),
    "grouped": ((2, 8, 8, 12), (3, 3, 4, 6), 1, 3),
    "depthwise": ((2, 8, 8, 12), (3, 3, 1, 12), 1, 12),
    "depthwise with a multiplier": ((2, 8, 8, 6), (3, 3, 1, 12), 2, 6),
}


def integers(rng, shape):
    return rng.integers(-127, 128, shape).astype(np.int8)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, rng):
    x_shape, kernel_shape, stride, groups = CONVOLUTIONS[name]
    x, kernel = integers(rng, x_shape), integers(rng, kernel_shape)

    def apply_fn(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    floats = x.astype(np.float32), kernel.astype(np.float32)
    (eqn,) = jax.make_jaxpr(apply_fn)(*floats).eqns
    got = jax.jit(lambda x, k: int8_conv(x, k, eqn.params))(x, kernel)
    names = inspect.signature(reference.conv).parameters
    params = {name: value for name, value in eqn.params.items() if name in names}
    np.testing.assert_array_equal(got, reference.conv(x, kernel, **params))


@pytest.mark.parametrize("shape", [(16, 64, 32), (5, 7, 3), (1, 1024, 1000)])
def test_dot(shape, rng):
    rows, inner, columns = shape
    x, w = integers(rng, (rows, inner)), integers(rng, (inner, columns))
    numbers = (((1,), (0,)), ((), ()))
    got = jax.jit(lambda x, w: int8_dot((x, w), numbers))(x, w)
    np.testing.assert_array_equal(got, x.astype(np.int64) @ w.astype(np.int64))


def test_a_quantized_network_agrees_with_the_cpu(rng):
    params = {
        "conv": jnp.asarray(rng.normal(size=(3, 3, 3, 16)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=(16, 10)), jnp.float32),
    }

    def apply_fn(p, x):
        x = jax.lax.conv_general_dilated(
            x, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x).mean((1, 2)) @ p["dense"]

    x = jnp.asarray(rng.normal(size=(4, 16, 16, 3)), jnp.float32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
    cpu = jax.devices("cpu")[0]
    on_cpu = qapply(jax.device_put(qparams, cpu), jax.device_put(x, cpu))
    np.testing.assert_allclose(qapply(qparams, x), on_cpu, rtol=1e-2, atol=1e-2)
