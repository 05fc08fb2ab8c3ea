"""Ragged dots in int8 models: experts that rows choose, with a scale for each and its channels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import reference
from tests.loops.measure import sqnr

pytestmark = pytest.mark.optimized

ROWS, GROUPS, WIDTH, HIDDEN = 24, 3, 8, 12
OPTIONS = {**reference.QUANTIZER, "is_full_quantize": False}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Experts of very different sizes: one scale for all would leave nothing of the first.
SPREAD = jnp.array([0.01, 1.0, 30.0])[:, None, None]
PARAMS = {
    "up": {"kernel": normal(0, GROUPS, WIDTH, HIDDEN), "bias": normal(1, HIDDEN)},
    "down": {"kernel": normal(2, GROUPS, HIDDEN, WIDTH) * SPREAD},
}
X = normal(3, ROWS, WIDTH)
SIZES = jnp.array([10, 0, 11])
SHAPES = ("rows, 8", "3")


def experts(p: Any, x: jax.Array, sizes: jax.Array) -> jax.Array:
    hidden = lax.ragged_dot(x, p["up"]["kernel"], sizes) + p["up"]["bias"]
    return lax.ragged_dot(jax.nn.relu(hidden), p["down"]["kernel"], sizes)


def quantized(mode: str) -> tuple[Any, jaxquant.QuantizedApply]:
    if mode == "dynamic":
        return jaxquant.quant_dynamic(PARAMS, experts, [(X, SIZES)], progress=False)
    asymmetric = {"activation_quantize_type": "asymmetric"} if mode == "asymmetric" else {}
    return jaxquant.quant_post(PARAMS, experts, [(X, SIZES)], **{**OPTIONS, **asymmetric})


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric", "dynamic"])
def test_experts_are_int8(mode: str) -> None:
    qparams, qapply = quantized(mode)
    rows = {row["name"]: row["status"] for row in qapply.report().rows}
    assert rows == {"up": "int8", "down": "int8"}
    assert qparams["params"]["up"]["kernel"]["int8"].shape == (GROUPS, WIDTH, HIDDEN)
    assert qparams["params"]["up"]["kernel"]["scale"].shape == (GROUPS * HIDDEN,)
    for sizes in (SIZES, jnp.array([0, 24, 0]), jnp.array([1, 1, 1]), jnp.array([9, 9, 9])):
        expected, found = experts(PARAMS, X, sizes), qapply(qparams, X, sizes)
        count = min(int(sizes.sum()), ROWS)
        ends = np.minimum(np.cumsum(sizes), ROWS)
        for start, end in zip([0, *ends[:-1]], ends, strict=True):  # each expert by itself
            if end > start:
                assert sqnr(expected[start:end], found[start:end]) > 30
        np.testing.assert_array_equal(found[count:], expected[count:])


def test_equals_the_float_model_on_rounded_weights_and_activations() -> None:
    one = {"kernel": PARAMS["up"]["kernel"] * SPREAD}
    qparams, qapply = jaxquant.quant_post(
        one, lambda p, x: lax.ragged_dot(x, p["kernel"], SIZES), [X], **OPTIONS
    )
    fake = jnp.asarray(reference.fake_weight(one["kernel"], (0, 2)), jnp.float32)
    expected = lax.ragged_dot(jnp.asarray(reference.fake(X), jnp.float32), fake, SIZES)
    np.testing.assert_allclose(qapply(qparams, X), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded(tmp_path: Any) -> None:
    qparams, qapply = quantized("symmetric")
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply, shapes=SHAPES)
    loaded, again = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(again(loaded, X, SIZES), qapply(qparams, X, SIZES))


@pytest.mark.parametrize("mode", ["symmetric", "dynamic"])
def test_onnx_refuses_it_by_name(tmp_path: Any, mode: str) -> None:
    qparams, qapply = quantized(mode)
    with pytest.raises(ValueError, match=r"an int8 ragged dot.*site 'up'"):
        jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply, shapes=SHAPES)


def test_experts_of_scanned_layers() -> None:
    """Each layer has its experts' scales; the integers are those of the layers one by one."""
    layers = jnp.stack([PARAMS["down"]["kernel"] * factor for factor in (1.0, 0.1)])
    params = {"layers": {"kernel": jnp.concatenate([layers, layers], axis=-1)[..., :HIDDEN]}}

    def scanned(p: Any, x: jax.Array) -> jax.Array:
        def step(carry: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(lax.ragged_dot(carry, kernel, SIZES)), None

        return lax.scan(step, x, p["layers"]["kernel"])[0]

    def unrolled(p: Any, x: jax.Array) -> jax.Array:
        for name in ("layer_0", "layer_1"):
            x = jnp.tanh(lax.ragged_dot(x, p[name]["kernel"], SIZES))
        return x

    apart = {f"layer_{k}": {"kernel": params["layers"]["kernel"][k]} for k in (0, 1)}
    x = normal(5, ROWS, HIDDEN)
    found, expected = (
        jaxquant.quant_post(p, f, [x], **OPTIONS) for p, f in ((params, scanned), (apart, unrolled))
    )
    np.testing.assert_array_equal(found[1](found[0], x), expected[1](expected[0], x))


def test_biases_that_are_corrected_are_analyzed() -> None:
    """The biases without correction have a number for each channel of the rows, not each expert."""
    qparams, qapply = jaxquant.quant_post(
        PARAMS, experts, [(X, SIZES)], **{**OPTIONS, "recover": ("bias_correction",)}
    )
    analysis = jaxquant.analyze(PARAMS, experts, qparams, qapply, [(X, SIZES)], progress=False)
    assert {row["name"] for row in analysis.rows} == {"up", "down"}
