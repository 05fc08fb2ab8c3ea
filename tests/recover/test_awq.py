"""Scales of input channels in the parameters before them, as users call it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxquant
from tests.loops import measure

WIDTH = 32
EVERYWHERE = (jaxquant.Rule("*", weight_bits=4),)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, UNSEEN = draw(0, 128, WIDTH), draw(1, 128, WIDTH)
GAIN = np.where(np.arange(WIDTH) % 8 == 3, 12, 1).astype(np.float32)  # a few large channels
PARAMS = {"gain": GAIN, "shift": draw(2, WIDTH) / 4, "w": draw(3, WIDTH, 24),
          "v": draw(4, WIDTH, 16)}  # fmt: skip


def network(p: Any, x: jax.Array) -> Any:
    x = x - x.mean(-1, keepdims=True)
    y = x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * p["gain"] + p["shift"]
    return y @ p["w"], y @ p["v"]


def residual(p: Any, x: jax.Array) -> Any:
    y = x * p["gain"] + p["shift"]
    return y @ p["w"], y


def quantize(apply_fn: Any, *recover: str, data: Any = X, **options: Any) -> Any:
    return jaxquant.quant_weights(
        PARAMS, apply_fn, data, weight_bits=4, recover=recover, progress=False,
        rules=EVERYWHERE, **options
    )  # fmt: skip


def sqnr(apply_fn: Any, *recover: str) -> float:
    qparams, qapply = quantize(apply_fn, *recover)
    wanted, found = apply_fn(PARAMS, UNSEEN), qapply(qparams, UNSEEN)
    return min(measure.sqnr(a, b) for a, b in zip(wanted, found, strict=True))


def test_weights_of_large_channels_are_stored_better():
    nearest, scaled = sqnr(network), sqnr(network, "awq")
    assert scaled > nearest + 2
    qparams, qapply = quantize(network, "awq")
    assert not np.array_equal(qparams["params"]["gain"], GAIN)  # which costs nothing in the call
    note = qapply.report().summary["recovery"]["awq"]
    assert note == "2 of 2 sites, 2 of which read what parameters scale"
    _, qapply = quantize(network, "gptq", "awq")
    assert all(row["rounding"].startswith("awq: error ") for row in qapply.report().rows)
    assert all("; gptq: error " in row["rounding"] for row in qapply.report().rows)


def test_what_others_read_stays():
    qparams, qapply = quantize(residual, "awq")
    np.testing.assert_array_equal(qparams["params"]["gain"], GAIN)
    note = qapply.report().summary["recovery"]["awq"]
    assert note == "0 of 1 sites, 0 of which read what parameters scale"
    plain, _ = quantize(residual)
    measure.assert_same_numbers(measure.flat(qparams), measure.flat(plain))


def test_saved_and_loaded_it_is_the_same(tmp_path):
    qparams, qapply = quantize(network, "awq", "gptq", group_size=8)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, again = jaxquant.load_quantized_model(tmp_path / "model")
    for found, wanted in zip(again(loaded, X), qapply(qparams, X), strict=True):
        np.testing.assert_array_equal(found, wanted)
