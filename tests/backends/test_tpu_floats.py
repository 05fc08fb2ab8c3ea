"""The forms of attention and GELU for TPUs, run on CPU, give what the model's equations give."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.backends import tpu_floats
from jaxquant.backends.backend import FloatOperation
from jaxquant.jax_shim import choices
from tests import networks

TPU = choices.Place("tpu", is_export=False, is_one_device=True)
X = networks.images(0, (3, 12, 16))


def test_gelu_is_the_same_within_a_small_part_of_a_step():
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)
    exact = 0.5 * x.astype(np.float64) * (1 + np.asarray(jax.lax.erf(x / np.sqrt(2, dtype="f4"))))
    struct = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    operation = FloatOperation(
        "gelu", {"approximate": "none"}, (struct,), x.shape, x.dtype, lambda x: x, is_int8=True
    )
    for step in (1 / 1000, 12 / 127):
        with choices.at(TPU):
            got = tpu_floats.run(operation, x, jnp.float32(1 / step), jnp.int32(3))
        want = np.clip(np.round(exact / step) + 3, -128, 127)
        apart = np.abs(np.asarray(got, np.float64) - want)
        assert apart.max() <= 1  # next to a tie
        assert apart.mean() < 0.01


def test_a_transformer_block():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x), mask=mask)
            return x + nn.Dense(16)(nn.gelu(nn.Dense(24)(x), approximate=False))

    mask = nn.make_causal_mask(X[..., 0])
    params = networks.random_params(lambda: Block().init(jax.random.key(0), X, mask))
    _is_the_same(Block().apply, params, X, mask)

    qparams, qapply = jaxquant.quant_post(params, Block().apply, [(X, mask)], recover=())
    modules = {
        platform: jax.export.export(jax.jit(qapply), platforms=[platform])(qparams, X, mask)
        for platform in ("cpu", "tpu")
    }
    dots = {name: each.mlir_module().count("dot_general %") for name, each in modules.items()}
    assert dots["tpu"] == dots["cpu"] + 1  # of the sums of the weights, quantized or not
    has_erfc = {name: "erfc" in each.mlir_module() for name, each in modules.items()}
    assert has_erfc == {"cpu": True, "tpu": False}


def test_masks_biases_and_shared_heads():
    def apply_fn(params, x, mask):
        q, k, v = (x @ params[name] for name in "qkv")
        q = q.reshape(3, 12, 2, 2, 4)
        k, v = (part.reshape(3, 12, 2, 4) for part in (k, v))
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k) * 0.5 + params["bias"]
        scores = jnp.where(mask[:, None, None, None], -1e9, scores)
        scores = jnp.where(np.tri(12, dtype=bool), scores, -1e9)
        mixed = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)
        return mixed.reshape(3, 12, 16) @ params["out"]

    sizes = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "bias": (2, 12, 12), "out": (16, 16)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    params["bias"] = params["bias"].reshape(2, 1, 12, 12)
    _is_the_same(apply_fn, params, X, np.arange(12) >= np.array([[12], [7], [1]]))


def test_softmax_as_a_site():
    def apply_fn(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        scores = jax.nn.softmax(jnp.swapaxes(q @ jnp.swapaxes(k, 1, 2), 1, 2), axis=1)
        return (jnp.swapaxes(scores, 1, 2) @ v) @ params["out"]

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(16, 16)).astype(np.float32) for name in ("q", "k", "v", "out")}
    _is_the_same(apply_fn, params, X, is_full_quantize=True)


def test_attention_of_bfloat16_with_values_as_wide_as_a_register():
    module = nn.MultiHeadDotProductAttention(2, qkv_features=256, dtype=jnp.bfloat16)
    params = networks.random_params(lambda: module.init(jax.random.key(0), X))
    params = jax.tree.map(lambda x: (x * 0.2).astype(jnp.bfloat16), params)
    x = X.astype(jnp.bfloat16)
    want, got = _results(module.apply, params, x)
    assert got.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, x, want, got))
    exact = module.clone(dtype=jnp.float32).apply(*wide[:2])
    want, got = (np.abs(result - exact).mean() for result in wide[2:])
    assert got < 1.1 * want


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_a_lookup_of_few_rows(mode: str):
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    numbers = np.array([[0, 1, 2], [3, -1, 2]], np.int32)[..., None]
    rows = numbers.shape[:-1] + table.shape[1:]
    operation = FloatOperation("few_rows", {"fills": mode == "fill"}, (), rows, table.dtype, print)
    with choices.at(TPU):
        got = tpu_floats.run(operation, jnp.asarray(numbers), jnp.asarray(table))
    want = table[numbers[..., 0].clip(0, 2)]
    if mode == "fill":
        want[1, :2] = np.nan
    np.testing.assert_array_equal(got, want)


def test_a_model_with_a_table_of_few_rows():
    def apply_fn(params, ids, x):
        types = jnp.take(params["types"], jnp.zeros_like(ids), axis=0)
        return jnp.tanh(x + types) @ params["dense"]

    params = {"types": X[0, :2], "dense": X[1].T @ X[1]}
    ids = np.zeros((3, 12), np.int32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [(ids, X)], recover=())
    text = {}
    for place in (choices.ONE_CPU, TPU):
        with choices.at(place):
            there = qapply.with_backend("xla")
            lowered = jax.jit(lambda q, i, x, there=there: there(q, i, x)).lower(qparams, ids, X)
        text[place.platform] = lowered.as_text()
        np.testing.assert_array_equal(lowered.compile()(qparams, ids, X), qapply(qparams, ids, X))
    assert {name: "stablehlo.gather" in each for name, each in text.items()} == {
        "cpu": True,
        "tpu": False,
    }


@pytest.mark.parametrize(("kind", "count"), [("TPU v5 lite", 1), ("TPU v6 lite", 0)])
def test_values_are_innermost_by_the_kind_of_tpu(kind: str, count: int):
    def apply_fn(params, x):
        return jax.nn.dot_product_attention(x, x, x).reshape(1, 8, 256) @ params["w"]

    params = {"w": jax.random.normal(jax.random.key(0), (256, 16))}
    x = jax.random.normal(jax.random.key(1), (1, 8, 2, 128))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=(), progress=False)
    with choices.at(TPU._replace(kind=kind)):
        text = str(jax.make_jaxpr(lambda *given: qapply(*given))(qparams, x))
    assert text.count("layout_constraint") == count


def _is_the_same(apply_fn, params, *inputs, **options):
    want, got = _results(apply_fn, params, *inputs, **options)
    error = np.abs(want - apply_fn(params, *inputs)).mean()
    assert np.abs(got - want).mean() < 0.02 * error


def _results(apply_fn, params, *inputs, **options):
    """Of the int8 model here and as on a TPU, where its softmax sums by one product more."""
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [inputs], recover=(), **options)
    here, there = (qapply.with_backend("xla") for _ in range(2))  # each is traced by itself
    want = jax.jit(here)(qparams, *inputs)
    with choices.at(TPU):
        there = jax.jit(there).lower(qparams, *inputs)
    assert _dots(there) == _dots(jax.jit(here).lower(qparams, *inputs)) + 1
    return want, there.compile()(qparams, *inputs)


def _dots(lowered) -> int:
    return lowered.as_text().count("stablehlo.dot_general")
