"""Attention between int8 sites as a TPU runs it: the same integers, held in floats."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.jax_shim import choices
from tests import networks

TPU = choices.Place("tpu", is_export=False, is_one_device=True)
X = networks.images(0, (3, 12, 16))
WEIGHTS = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "bias": (2, 1, 12, 12), "out": (16, 16)}


def weights(sizes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def floats_of_it(apply_fn, params, *inputs, **options) -> int:
    """How many products are of floats on a TPU and of int8 here, with the same results."""
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [inputs], is_full_quantize=True, recover=(), progress=False, **options
    )
    here, there = (qapply.with_backend("xla") for _ in range(2))  # each is traced by itself
    here = jax.jit(here).lower(qparams, *inputs)
    with choices.at(TPU):
        there = jax.jit(there).lower(qparams, *inputs)
    want, got = (each.compile()(qparams, *inputs) for each in (here, there))
    np.testing.assert_array_equal(got, want)
    return products_of_floats(there) - products_of_floats(here)


def products_of_floats(lowered) -> int:
    lines = lowered.as_text().splitlines()
    return sum("stablehlo.dot_general" in line and "i8" not in line for line in lines)


@pytest.fixture(autouse=True)
def on_a_tpu(monkeypatch: pytest.MonkeyPatch):
    """There a dense layer's result is quantized with its sums."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")


@pytest.mark.parametrize("activations", ["symmetric", "asymmetric"])
def test_flax(activations: str):
    module = nn.Sequential([nn.MultiHeadDotProductAttention(4), nn.Dense(16)])
    params = networks.random_params(lambda: module.init(jax.random.key(0), X))
    assert floats_of_it(module.apply, params, X, activation_quantize_type=activations) == 2


def test_masks_biases_and_shared_heads():
    mask = np.arange(12) < np.array([[12], [7], [1]])
    assert floats_of_it(networks.shared_heads, weights(WEIGHTS), X, mask) == 2


@pytest.mark.parametrize(("keys", "count"), [(512, 2), (1032, 0)])
def test_sums_that_floats_do_not_hold_stay_integers(keys: int, count: int):
    def apply_fn(params, x, others):
        k, v = (others @ params[name] for name in "kv")
        return jax.nn.softmax(x @ params["q"] @ k.swapaxes(1, 2)) @ v @ params["out"]

    params = weights(dict.fromkeys(("q", "k", "v", "out"), (16, 16)))
    others = networks.images(1, (3, keys, 16))
    assert floats_of_it(apply_fn, params, X, others) == count


def test_rows_whose_keys_are_all_hidden_are_nan():
    def apply_fn(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = jnp.where(mask[:, None], q @ k.swapaxes(1, 2), -jnp.inf)
        return jax.nn.softmax(scores) @ v @ params["out"]

    params = weights(dict.fromkeys(("q", "k", "v", "out"), (16, 16)))
    mask = np.arange(12) < np.array([[12], [7], [1]])
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [(X, mask)], is_full_quantize=True, recover=(), progress=False
    )
    with choices.at(TPU):
        y = qapply.with_backend("xla")(qparams, X, mask & (np.arange(3) < 2)[:, None])
    assert [bool(np.isnan(each).all()) for each in np.asarray(y)] == [False, False, True]


def test_what_else_reads_keys_has_them_in_int8():
    def apply_fn(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        return jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v @ params["out"] + k @ params["more"]

    params = weights(dict.fromkeys(("q", "k", "v", "out", "more"), (16, 16)))
    assert floats_of_it(apply_fn, params, X) == 2  # queries are floats, so keys are made such
