"""Outliers: dots that one scale does not fit get scales by channel or by row, unasked."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.loops import measure
from tests.loops.test_recovery import assert_layers_are_alike

WIDTH, LAYERS = 32, 2
BIAS_ALONE = ("bias_correction",)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_channels() -> dict[str, np.ndarray]:
    """Layers whose normalization makes two channels 60 times larger than the others."""
    gain = np.ones((LAYERS, WIDTH), np.float32)
    gain[:, [3, 17]] = 60
    return {
        "gain": gain,
        "up": draw(1, LAYERS, WIDTH, WIDTH) / 8 / gain[:, :, None],
        "down": draw(2, LAYERS, WIDTH, WIDTH) / 8,
    }


def layer(x: jax.Array, p: Any) -> jax.Array:
    normal = x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x + jnp.tanh((normal * p["gain"]) @ p["up"]) @ p["down"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda x, p: (layer(x, p), None), x, p)[0]


def by_hand(p: Any, x: jax.Array) -> jax.Array:
    for each in p:
        x = layer(x, each)
    return x


CHANNELS = with_channels()
X = draw(0, 96, WIDTH)


def quantize(params: Any, apply_fn: Any, **options: Any) -> tuple[Any, Any]:
    batches = [X[:32], X[32:64]]
    return jaxquant.quant_post(params, apply_fn, batches, progress=False, **options)


def sqnr(apply_fn: Any, params: Any, qparams: Any, qapply: Any, x: Any = X[64:]) -> float:
    return measure.sqnr(apply_fn(params, x), qapply(qparams, x))


def test_large_channels_are_divided_alike_in_a_scan_and_in_a_python_loop():
    qparams, qapply = quantize(CHANNELS, scanned)
    without = quantize(CHANNELS, scanned, recover=BIAS_ALONE)
    gained = sqnr(scanned, CHANNELS, qparams, qapply) - sqnr(scanned, CHANNELS, *without)
    assert gained > 10
    (rule,) = qapply.report().rules
    assert (rule.pattern, rule.recover) == ("site:up", ("equalization", "bias_correction"))
    assert "some channels of its input are far larger" in rule.reason
    assert without[1].report().rules == ()

    each = [jax.tree.map(lambda w, n=n: w[n], CHANNELS) for n in range(LAYERS)]
    others, unrolled = quantize(each, by_hand)
    assert_layers_are_alike(qparams, others)
    assert [rule.pattern for rule in unrolled.report().rules] == ["site:0/up", "site:1/up"]


def tokens(rows: int, seed: int) -> np.ndarray:
    """Rows of which one in 16 has a value of 100 in a channel, each in another one."""
    x = draw(seed, rows, WIDTH)
    large = np.arange(0, rows, 16)
    x[large, (5 * large // 16 + seed) % WIDTH] = 100
    return x


def two_dots(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["body"]) @ p["head"]


DOTS = {"body": draw(5, WIDTH, WIDTH) / 8, "head": draw(6, WIDTH, WIDTH)}


def of_tokens(**options: Any) -> tuple[Any, Any]:
    warnings.simplefilter("ignore")  # of poor models
    batches = [tokens(256, 7), tokens(256, 8)]
    options = {"algo": "abs_max", "progress": False, **options}
    return jaxquant.quant_post(DOTS, two_dots, batches, **options)


def test_large_rows_are_scaled_in_the_call():
    qparams, qapply = of_tokens()
    (rule,) = qapply.report().rules
    assert (rule.pattern, rule.dynamic) == ("site:body", True)
    assert "some rows of its input are far larger" in rule.reason
    again, _ = of_tokens(rules=qapply.report().rules)
    jax.tree.map(np.testing.assert_array_equal, again, qparams)

    x = tokens(256, 9)
    static = of_tokens(recover=BIAS_ALONE)
    assert sqnr(two_dots, DOTS, qparams, qapply, x) > sqnr(two_dots, DOTS, *static, x) + 10


def test_outliers_that_are_frequent_are_seen():
    """One row in 8, as the first of short sequences; they make up the mean square."""

    def frequent(seed: int) -> np.ndarray:
        x = draw(seed, 256, WIDTH)
        x[::8] *= 300
        return x

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ p["body"]) @ p["head"]

    warnings.simplefilter("ignore")
    qparams, qapply = jaxquant.quant_post(DOTS, apply_fn, [frequent(7)], progress=False)
    x = frequent(9)
    want, found = np.asarray(apply_fn(DOTS, x)), np.asarray(qapply(qparams, x))
    others = np.arange(len(x)) % 8 != 0
    assert measure.sqnr(want[others], found[others]) > 15


def test_where_tensors_stay_int8_no_dot_leaves_them():
    def residual(p: Any, x: jax.Array) -> jax.Array:
        return jnp.maximum(x @ p["body"] + x, 0) @ p["head"]

    batches = [tokens(256, 7), tokens(256, 8)]
    _, qapply = jaxquant.quant_post(
        DOTS, residual, batches, algo="abs_max", is_full_quantize=True, progress=False
    )
    assert not any(site.dynamic for site in qapply.plan.sites)
    _, qapply = jaxquant.quant_post(DOTS, residual, batches, algo="abs_max", progress=False)
    assert any(site.dynamic for site in qapply.plan.sites)


def test_numbers_that_tell_no_layer_join_nothing_of_unlike_shapes():
    """Haiku numbers all dots of a model in one row."""
    layers = {"linear_1": CHANNELS["up"][0], "linear_2": draw(6, WIDTH, 2 * WIDTH)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh((x * CHANNELS["gain"][0]) @ p["linear_1"]) @ p["linear_2"]

    _, qapply = quantize(layers, apply_fn)
    assert [rule.pattern for rule in qapply.report().rules] == ["site:linear_1"]


def test_what_a_rule_says_of_a_dot_stays():
    for setting in ({"dynamic": False}, {"recover": ()}):
        _, qapply = of_tokens(rules=[jaxquant.Rule("body", **setting)])
        assert not any(site.dynamic for site in qapply.plan.sites)


@pytest.mark.parametrize(("params", "apply_fn"), [
    ({"a": draw(1, WIDTH, WIDTH), "b": draw(2, WIDTH, 8)},
     lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"]),
    (draw(1, WIDTH, WIDTH), lambda w, x: x @ w),
])  # fmt: skip
def test_ordinary_tensors_are_not_looked_at(params, apply_fn, monkeypatch):
    def looked(*args: Any) -> Any:
        raise AssertionError("the samples were run for nothing")

    monkeypatch.setattr("jaxquant.tune.outliers.tensor_trials", looked)
    _, qapply = quantize(params, apply_fn)
    assert qapply.report().rules == ()
