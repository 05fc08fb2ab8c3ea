"""NaN in tensors of which XLA's largest value on CPU leaves it out, compiled as users compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.calibration import counting
from jaxquant.jax_shim.extremes import largest, least
from tests import networks

pytestmark = pytest.mark.optimized
SHAPE = (50, 130)  # of a tensor whose largest value leaves NaN out
BAD = 3


def with_bad(value, shape=SHAPE):
    return networks.images(0, shape).at[(BAD, *[0] * (len(shape) - 1))].set(value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ours", [least, largest])
def test_they_tell_of_the_rows_that_hold_them(ours, value):
    x, others = with_bad(value), np.arange(50) != BAD
    found = np.asarray(jax.jit(lambda x: ours(x, axis=1))(x))
    assert np.flatnonzero(np.isnan(found)).tolist() == [BAD]
    expected = np.asarray(x)[others]
    expected = expected.min(axis=1) if ours is least else expected.max(axis=1)
    np.testing.assert_array_equal(found[others], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_batch_that_holds_them_is_not_counted(value):
    _, (low, high) = jax.jit(counting.portable_counts)(with_bad(value))
    assert not (low > -np.inf and high < np.inf)


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_they_stay_in_their_row_of_a_dot_that_is_scaled_in_the_call(kind):
    params = {"w": networks.images(1, (130, 33))}
    qparams, qapply = jaxquant.quant_dynamic(
        params, lambda p, x: x @ p["w"], jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        activation_quantize_type=kind, progress=False,
    )  # fmt: skip
    found = np.isnan(jax.jit(qapply)(qparams, with_bad(np.nan)))
    assert np.flatnonzero(found.any(axis=1)).tolist() == [BAD]
    assert found[BAD].all()


def test_they_stay_in_their_sample_of_a_convolution_that_is_scaled_in_the_call():
    shape, params = (8, 16, 16, 12), {"k": networks.images(1, (3, 3, 12, 24))}
    numbers = ("NHWC", "HWIO", "NHWC")

    def net(p, x):
        return lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)

    qparams, qapply = jaxquant.quant_dynamic(
        params, net, jax.ShapeDtypeStruct(shape, jnp.float32), progress=False
    )
    found = np.isnan(jax.jit(qapply)(qparams, with_bad(np.nan, shape))).any(axis=(1, 2, 3))
    assert np.flatnonzero(found).tolist() == [BAD]


def test_those_of_a_weight_that_is_computed_stay_in_their_channel():
    params = {"w": networks.images(1, (130, 130))}

    def net(p, x):
        return x[:40] @ jnp.log(jnp.abs(x[40:170] * p["w"]) - 1e-12)

    x = networks.images(0, (170, 130))
    qparams, qapply = jaxquant.quant_dynamic(
        params, net, x, quantizable_op_type=("mul", "matmul"), allow_batch_dependence=True,
        progress=False,
    )  # fmt: skip
    found = np.isnan(jax.jit(qapply)(qparams, x.at[40 + BAD, 5].set(jnp.nan)))
    assert np.flatnonzero(found.any(axis=0)).tolist() == [5]
    assert found[:, 5].all()
