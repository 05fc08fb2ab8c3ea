"""Bias correction: a known shift is found, an activation's dead part does not count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant


def sqnr(reference: Any, got: Any) -> float:
    reference, got = np.float64(reference), np.float64(got)
    return 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum())


def biased_model(seed: int = 0) -> tuple[Any, Any, np.ndarray]:
    """Inputs far from zero, so that rounded weights leave a mean error in each channel."""
    rng = np.random.default_rng(seed)
    params = {
        "a": jnp.asarray(rng.normal(size=(64, 32)) ** 3, jnp.float32),
        "b": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32),
    }
    x = (5 + 0.1 * rng.normal(size=(256, 64))).astype(np.float32)
    return params, lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], x


def quantize(params: Any, apply_fn: Any, ds: Any, **options: Any) -> Any:
    return jaxquant.quant_post(params, apply_fn, ds, algo="abs_max", progress=False, **options)


def test_the_mean_error_of_every_channel_goes():
    params, _, x = biased_model()

    def linear(p: Any, x: Any) -> Any:
        return x @ p["a"]

    batches = [x[:32], x[32:64]]
    want = np.asarray(linear(params, x[:64]))
    errors = {}
    for recover in ((), ("bias_correction",)):
        qparams, qapply = quantize(params, linear, batches, recover=recover)
        errors[recover] = np.abs(np.mean(want - np.asarray(qapply(qparams, x[:64])), axis=0))
    assert errors[()].max() > 0.02
    assert errors[("bias_correction",)].max() < errors[()].max() / 20


def test_the_model_gains_on_samples_that_it_has_not_seen():
    params, apply_fn, x = biased_model()
    want, found = np.asarray(apply_fn(params, x[64:])), {}
    for recover in ((), ("bias_correction",)):
        qparams, qapply = quantize(params, apply_fn, [x[:64]], recover=recover)
        found[recover] = sqnr(want, qapply(qparams, x[64:]))
        assert qapply.plan.recover == recover
    assert found[("bias_correction",)] > found[()] + 6


def test_what_a_relu_discards_does_not_count():
    """Most pre-activations are far below zero and far off; those that pass are exact."""
    w = np.zeros((2, 127), np.float32)
    w[0, 0], w[1, 0] = 1.0, 0.4999 / 127  # rounds to nothing: an error in the second input alone
    w[0, 1:], w[1, 1:] = 1.0, 1.0
    x = np.zeros((40, 2), np.float32)
    x[:20, 0] = np.linspace(1, 127, 20)
    x[20:, 0], x[20:, 1] = -127.0, -127.0  # the error is here, and the ReLU takes it away

    def apply_fn(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["w"])

    params = {"w": jnp.asarray(w)}
    with_, without = (
        np.asarray(qapply(qparams, x)[:, 0])
        for qparams, qapply in (
            quantize(params, apply_fn, [x], recover=recover)
            for recover in (("bias_correction",), ())
        )
    )
    error = np.abs(without - np.asarray(apply_fn(params, x))[:, 0])
    assert np.abs(with_ - np.asarray(apply_fn(params, x))[:, 0]).mean() <= error.mean() + 1e-6


def test_a_single_sample_corrects_nothing():
    params, apply_fn, x = biased_model()
    plain, _ = quantize(params, apply_fn, [x[:1]], recover=())
    corrected, _ = quantize(params, apply_fn, [x[:1]])
    bias = corrected["sites"]["a"]["bias"] - plain["sites"]["a"].get("bias", 0.0)
    np.testing.assert_array_equal(bias, np.zeros(32))


def test_inputs_are_left_as_they_are_and_shapes_are_kept():
    params, apply_fn, x = biased_model()
    plain, _ = quantize(params, apply_fn, [x[:8]], recover=())
    corrected, _ = quantize(params, apply_fn, [x[:8]])
    assert corrected["sites"]["a"]["bias"].shape == (32,)
    assert corrected["sites"]["a"]["bias"].dtype == np.float32
    np.testing.assert_array_equal(plain["params"]["a"]["int8"], corrected["params"]["a"]["int8"])


def test_an_unknown_step_is_refused():
    params, apply_fn, x = biased_model()
    with pytest.raises(
        ValueError, match=r"recover: 'bias_corection' is not known.*bias_correction"
    ):
        quantize(params, apply_fn, [x], recover=("bias_corection",))


def test_batches_of_several_lengths_go_through_a_scan_of_layers():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(2, 8, 8)), jnp.float32)}

    def apply_fn(p: Any, x: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    batches = [5 + rng.normal(size=(4, length, 8)).astype(np.float32) for length in (6, 3)]
    qparams, qapply = quantize(params, apply_fn, batches, recover=("bias_correction",))
    for x in batches:
        assert sqnr(apply_fn(params, x), qapply(qparams, x)) > 20
