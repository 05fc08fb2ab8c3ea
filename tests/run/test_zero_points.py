"""Zero points: the sums of the values less their zero points, exactly, in every form."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.backends import int8
from jaxquant.graph import contraction
from jaxquant.graph.trace import trace
from jaxquant.plan.plan import TensorPlan
from tests import reference
from tests.backends.test_conv import compile_fast, convolutions, settings
from tests.contractions import int8_conv

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("numbers_as_they_are")]


def integers(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 127, shape, np.int8, endpoint=True)


@settings
@hypothesis.given(
    convolution=st.one_of(convolutions(), convolutions(depthwise=True)),
    zero=st.sampled_from((-128, -5, 31, 127)),
    varies=st.booleans(),
)
def test_convolution_pads_with_the_zero_point(convolution, zero, varies):
    lhs, rhs, params = convolution
    x, kernel = integers(0, lhs), integers(1, rhs)

    def run(x: jax.Array, kernel: jax.Array, *point: jax.Array) -> jax.Array:
        return int8_conv(x, kernel, params, point[0] if varies else zero)

    got = compile_fast(run)(x, kernel, *[np.int32(zero)] * varies)
    spec = params["dimension_numbers"]
    sums = kernel.astype(np.int64).transpose(spec.rhs_spec).reshape(rhs[spec.rhs_spec[0]], -1)
    want = reference.conv(x.astype(np.int64) - zero, kernel, **params)
    offset = reference.along(zero * sums.sum(1), [len(sums)], [spec.out_spec[1]], want.ndim)
    np.testing.assert_array_equal(np.asarray(got).astype(np.int64) - offset, want)


@pytest.mark.parametrize("zeros", [(0, 0), (-128, 0), (0, 7), (-128, -100)])
@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ij,jk->ik", ((3, 5), (5, 4))), ("bhqd,bhkd->bhqk", ((2, 3, 4, 5), (2, 3, 6, 5))),
     ("abij,jb->bai", ((2, 3, 4, 5), (5, 3))), ("i,i->", ((7,), (7,)))],
)  # fmt: skip
def test_dot_of_two_tensors(zeros, equation, shapes):
    operands = [integers(k, shape) for k, shape in enumerate(shapes)]
    (eqn,) = (
        e for e in jax.make_jaxpr(lambda a, b: jnp.einsum(equation, a, b))(
            *(x.astype(np.float32) for x in operands)
        ).jaxpr.eqns if e.primitive.name == "dot_general"
    )  # fmt: skip
    a, b = (x.aval.shape for x in eqn.invars)
    swapped = (a, b) != shapes  # einsum may swap them
    pair, z = (operands[::-1], zeros[::-1]) if swapped else (operands, zeros)
    numbers = eqn.params["dimension_numbers"]
    given = contraction.dot(numbers, (len(a), len(b)))
    got = int8.dot_of_tensors(tuple(map(jnp.asarray, pair)), given, z)
    varying = int8.dot_of_tensors(tuple(map(jnp.asarray, pair)), given, list(map(jnp.int32, z)))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(varying))
    wide = [jnp.asarray(x.astype(np.int64) - w, jnp.float32) for x, w in zip(pair, z)]
    want = lax.dot_general(*wide, numbers, precision="highest")
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want).astype(np.int64))


def test_quantize_saturates_and_rounds_to_even():
    x = jnp.array([-1.0, 0.0, 0.5, 1.5, 254.0, 255.0, 400.0])
    assert int8.quantize(x, jnp.float32(1), -128).tolist() == [
        -128, -128, -128, -126, 126, 127, 127]  # fmt: skip
    back = int8.dequantize(int8.quantize(x, jnp.float32(1), -128), jnp.float32(1), -128)
    assert back.tolist() == [0.0, 0.0, 0.0, 2.0, 254.0, 255.0, 255.0]


def test_quantize_and_back_with_a_zero_point_that_varies():
    x = jnp.linspace(-300.0, 300.0, 241)
    for zero in (-128, 0, 77):
        known = int8.quantize(x, jnp.float32(1), zero)
        varying = jax.jit(int8.quantize)(x, jnp.float32(1), jnp.int32(zero))
        np.testing.assert_array_equal(known, varying)
        back = jax.jit(int8.dequantize)(varying, jnp.float32(0.25), jnp.int32(zero))
        np.testing.assert_array_equal(back, int8.dequantize(known, jnp.float32(0.25), zero))


@pytest.mark.parametrize("zero", [-128, 0, 100])
@pytest.mark.parametrize("varies", [False, True])
def test_gather_fills_with_the_zero_point(zero, varies):
    x, indices = np.arange(-128, 128, dtype=np.int8).reshape(64, 4), np.array([3, 70, 63, 0])

    def floats(params: Any, x: jax.Array, indices: jax.Array) -> jax.Array:
        return jnp.take(x, indices, axis=0, mode="fill")

    graph = trace(floats, {}, (jnp.asarray(x, jnp.float32), jnp.asarray(indices)))
    (eqn,) = (eqn for eqn in graph.equations if eqn.name == "gather")
    point = jnp.int32(zero) if varies else zero
    got = int8.gather(eqn, [jnp.asarray(x), jnp.asarray(indices)[:, None]], point)
    want = x[indices % 64]
    want[1] = zero
    np.testing.assert_array_equal(got, want)


def grid(tensor: TensorPlan, x: np.ndarray) -> np.ndarray:
    """The values that the int8 form of a tensor stands for."""
    product = np.asarray(x, np.float32) * np.float32(1 / tensor.scale)
    code = np.clip(np.rint(product) + tensor.zero_point, -128, 127)
    return (code - tensor.zero_point) * tensor.scale


def quantized(params: Any, apply_fn: Any, *inputs: Any, **options: Any) -> Any:
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [inputs], algo="abs_max", recover=(), progress=False, **options
    )
    tensors = {tensor.name: tensor for tensor in qapply.plan.tensors}
    return np.asarray(qapply(qparams, *inputs)), tensors


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_model_with_padded_convolution(groups, low):
    rng = np.random.default_rng(0)
    x = rng.uniform(low, 4.0, (2, 6, 5, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 4 // groups, 4)).astype(np.float32)
    params = {"conv": {"kernel": jnp.asarray(kernel), "bias": jnp.arange(4.0)}}

    def apply_fn(p: Any, x: Any) -> Any:
        y = lax.conv_general_dilated(
            x, p["conv"]["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups)  # fmt: skip
        return y + p["conv"]["bias"]

    got, tensors = quantized(params, apply_fn, x)
    (tensor,) = tensors.values()
    assert tensor.zero_point == (-128 if low == 0 else -77)
    weight = jnp.asarray(reference.fake_weight(kernel, [3]), jnp.float32)
    want = apply_fn({"conv": {**params["conv"], "kernel": weight}}, grid(tensor, x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_model_with_a_shared_weight_and_two_dots():
    rng = np.random.default_rng(1)
    x = rng.uniform(0, 2, (5, 6)).astype(np.float32)
    w = rng.normal(size=(6, 6)).astype(np.float32)

    def apply_fn(p: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ p["w"])
        return y @ p["w"], y @ jnp.exp(-y).T

    options = {"quantizable_op_type": ("mul", "matmul")}
    qparams, qapply = jaxquant.quant_post(
        {"w": jnp.asarray(w)}, apply_fn, [x], algo="abs_max", recover=(), progress=False, **options
    )
    zero_points = [tensor.zero_point for tensor in qapply.plan.tensors]
    assert zero_points == [-128] * 3  # x, y and exp(-y) are never negative
    want = apply_fn({"w": jnp.asarray(w)}, x)
    for got, exact in zip(qapply(qparams, x), want):
        assert np.abs(np.asarray(got) - np.asarray(exact)).max() < 0.03 * np.abs(exact).max()
