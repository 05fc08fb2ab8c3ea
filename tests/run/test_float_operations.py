"""Attention, GELU and layer normalization between int8 sites run in one pass, and are the same."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from tests import networks
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

KERNELS = ("jaxquant_attention", "jaxquant_gelu", "jaxquant_layer_norm")
X = networks.images(0, (3, 12, 16))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(24)(nn.LayerNorm()(x)))
        return x + nn.Dense(16)(hidden)


def drawn(module: nn.Module, *inputs: np.ndarray):
    return networks.random_params(lambda: module.init(jax.random.key(0), *inputs))


def quantized(mode: str, module: nn.Module, *inputs: np.ndarray):
    """(params, the float model, qparams, qapply)."""
    params = drawn(module, *inputs)
    options = {"post": {"recover": ()}, "weights": {"recover": ()}, "dynamic": {}}[mode]
    quantize = getattr(jaxquant, f"quant_{mode}")
    samples = inputs if len(inputs) == 1 else [inputs]
    return params, module.apply, *quantize(params, module.apply, *samples, **options)


def called(function, *arguments) -> list[str]:
    """The kernels of floats that a compiled program calls, in order of their names."""
    text = jax.jit(function).lower(*arguments).as_text()
    return sorted(name for name in KERNELS for _ in range(text.count(f"@{name}(")))


@pytest.mark.parametrize("mode", ["post", "dynamic", "weights"])
def test_a_transformer_block_in_every_mode(mode: str):
    params, apply_fn, qparams, qapply = quantized(mode, Block(), X)
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    assert called(native, qparams, X) == [*KERNELS, KERNELS[-1]]
    assert called(xla, qparams, X) == []
    # Rounding of floats may move an integer by one where it is next to a tie.
    got, want, y = native(qparams, X), xla(qparams, X), apply_fn(params, X)
    assert np.abs(got - want).mean() < 0.02 * np.abs(want - y).mean()


@pytest.mark.parametrize("logits", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_computed_in_float32(logits):
    """Scores and their softmax are bfloat16, or float32 as in `jax.nn.dot_product_attention`."""

    def in_float32(q, k, v, mask, **_):
        bias = jnp.where(mask, 0.0, -1e9).astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, bias=bias)

    class Model(nn.Module):
        dtype: object

        @nn.compact
        def __call__(self, x, mask):
            fn = nn.dot_product_attention if logits == jnp.bfloat16 else in_float32
            attention = nn.MultiHeadDotProductAttention(4, dtype=self.dtype, attention_fn=fn)
            x = x + attention(nn.LayerNorm(dtype=self.dtype)(x), mask=mask)
            hidden = nn.gelu(nn.Dense(24, dtype=self.dtype)(x))
            return (x + nn.Dense(16, dtype=self.dtype)(hidden)).astype(jnp.float32)

    counts = np.arange(12) < np.array([[12], [7], [1]])
    mask = nn.make_attention_mask(counts, counts)
    with jax.numpy_dtype_promotion("standard"):  # which flax's normalization needs
        params, _, qparams, qapply = quantized("post", Model(jnp.bfloat16), X, mask)
        native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
        assert called(native, qparams, X, mask) == [*KERNELS]
        want = Model(jnp.float32).apply(params, X, mask)
        errors = [np.abs(form(qparams, X, mask) - want).mean() for form in (native, xla)]
        assert errors[0] < 1.05 * errors[1]


def test_what_is_asked_for_is_in_no_call():
    """Full mode has int8 attention, and GELU of floats; an export has XLA's own operations."""
    module = Block()
    params = drawn(module, X)
    qparams, qapply = jaxquant.quant_post(
        params, module.apply, X, is_full_quantize=True, recover=()
    )
    calls = called(qapply.with_backend("native"), qparams, X)
    assert calls == ["jaxquant_gelu"]  # the normalizations read int8
    qparams, qapply = jaxquant.quant_post(params, module.apply, X, recover=())
    exported = jax.export.export(jax.jit(qapply.with_backend("native")))(qparams, X)
    assert not any(name in exported.mlir_module() for name in KERNELS)


def test_masks_biases_and_shared_heads():
    apply_fn = networks.shared_heads
    sizes = {"q": (16, 16), "k": (16, 8), "v": (16, 8), "bias": (2, 12, 12), "out": (16, 16)}
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    params["bias"] = params["bias"].reshape(2, 1, 12, 12)
    mask = np.arange(12) < np.array([[12], [7], [1]])
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [(X, mask)], recover=())
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    assert called(native, qparams, X, mask) == ["jaxquant_attention"]
    got, want = native(qparams, X, mask), xla(qparams, X, mask)
    error = np.abs(want - apply_fn(params, X, mask)).mean()
    assert np.abs(got - want).mean() < 0.02 * error


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_what_is_beside_scores_is_made_of_parts_with_sizes_of_one(kind: str):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, counts):
            mask = nn.make_attention_mask(counts, counts)
            if kind == "mask":
                return nn.Dense(16)(nn.MultiHeadDotProductAttention(4)(x, mask=mask))
            q, k, v = (nn.Dense(16)(x).reshape(3, 12, 4, 4) for _ in range(3))
            table = self.param("table", nn.initializers.normal(1.0), (1, 4, 12, 12))
            bias = table + jnp.where(counts, 0.0, -1e9)[:, None, None]
            mixed = jax.nn.dot_product_attention(q, k, v, bias=bias)
            return nn.Dense(16)(mixed.reshape(3, 12, 16))

    counts = np.arange(12) < np.array([[12], [7], [1]])
    params, apply_fn, qparams, qapply = quantized("post", Model(), X, counts)
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    assert called(native, qparams, X, counts) == ["jaxquant_attention"]
    got, want = native(qparams, X, counts), xla(qparams, X, counts)
    error = np.abs(want - apply_fn(params, X, counts)).mean()
    assert np.abs(got - want).mean() < 0.02 * error


def test_scores_of_one_key_that_a_bias_repeats():
    def apply_fn(params, x, bias):
        q, k, v = x @ params["q"], x[:, :1] @ params["k"], x @ params["v"]
        scores = jnp.einsum("bqd,bkd->bqk", q, k) + bias
        return (jax.nn.softmax(scores) @ v) @ params["out"]

    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(16, 16)).astype(np.float32) for name in ("q", "k", "v", "out")}
    bias = rng.normal(size=(3, 12, 12)).astype(np.float32)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [(X, bias)], recover=())
    got, want = (qapply.with_backend(b)(qparams, X, bias) for b in ("native", "xla"))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_inside_a_scan_it_is_the_same_kernel():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(Block(name="block"), x, None)[0]

    _, _, qparams, qapply = quantized("post", Scanned(), X)
    native = qapply.with_backend("native")
    assert set(called(native, qparams, X)) == {*KERNELS}
    want = qapply.with_backend("xla")(qparams, X)
    assert np.abs(native(qparams, X) - want).mean() < 0.01 * np.abs(want).mean()


def test_nnx_attention_is_found():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.attention = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs)
            self.out = nnx.Linear(16, 5, rngs=rngs)

        def __call__(self, x):
            return self.out(self.attention(x))

    graph, state = nnx.split(Model())

    def apply_fn(state, x):
        return nnx.merge(graph, state)(x)

    qparams, qapply = jaxquant.quant_post(state, apply_fn, X, recover=())
    assert called(qapply.with_backend("native"), qparams, X) == ["jaxquant_attention"]


@pytest.mark.parametrize("beside", ["nothing", "mask", "bias", "both"])
@pytest.mark.parametrize("rows", [1, 12])
def test_attention_by_matmul_of_a_batch_of_one(rows: int, beside: str):
    params = {"w": np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32) / 4}
    mask = np.tri(12, 12, dtype=bool)[-rows:]
    bias = np.random.default_rng(1).normal(size=(4, rows, 12)).astype(np.float32)

    def apply_fn(params, x):
        heads = jnp.moveaxis((x @ params["w"]).reshape(*x.shape[:2], 4, 4), 2, 1)
        scores = heads[:, :, -rows:] @ jnp.swapaxes(heads, -1, -2) / 2
        scores = scores + bias if beside in ("bias", "both") else scores
        scores = jnp.where(mask, scores, -1e9) if beside in ("mask", "both") else scores
        return jax.nn.softmax(scores) @ heads

    qparams, qapply = jaxquant.quant_weights(params, apply_fn, X, recover=())
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    for x in (X, X[1:2]):
        assert called(native, qparams, x) == ["jaxquant_attention"]
        np.testing.assert_allclose(native(qparams, x), xla(qparams, x), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mode", ["dynamic", "weights"])
def test_a_step_of_a_decoder_reads_its_cache_as_it_lies(mode: str, dtype):
    module = nn.MultiHeadDotProductAttention(4, decode=True, dtype=dtype)
    variables = module.init(jax.random.key(0), jnp.asarray(X, dtype))
    cache = variables["cache"]

    def apply_fn(params, cache, x):
        return module.apply({"params": params, "cache": cache}, x, mutable=["cache"])

    params = drawn(module, jnp.asarray(X, dtype))["params"]
    options = {"recover": ()} if mode == "weights" else {}
    qparams, qapply = getattr(jaxquant, f"quant_{mode}")(
        params, apply_fn, [(cache, X[:, :1])], **options
    )
    native, xla = qapply.with_backend("native"), qapply.with_backend("xla")
    program = jax.jit(native).lower(qparams, cache, X[:, :1]).as_text()
    keys = f"3x12x4x4x{'f32' if dtype == jnp.float32 else 'bf16'}"
    call = next(line for line in program.splitlines() if "@jaxquant_attention(" in line)
    assert call.count(keys) == 2, "keys and values are what the cache holds"
    caches = [cache, cache]
    for step in range(4):
        x = X[:, step : step + 1]
        got, caches[0] = native(qparams, caches[0], x)
        want, caches[1] = xla(qparams, caches[1], x)
        caches = [jax.tree.map(jnp.asarray, each["cache"]) for each in caches]
        difference = np.linalg.norm(np.float32(got) - np.float32(want))
        assert difference < (1e-5 if dtype == jnp.float32 else 0.02) * np.linalg.norm(want)


def test_nan_goes_through():
    _, _, qparams, qapply = quantized("post", Block(), X)
    bad = np.array(X)
    bad[1, 3, 2] = np.nan
    y = np.asarray(qapply.with_backend("native")(qparams, bad))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[::2], qapply.with_backend("native")(qparams, X)[::2])


def test_batches_of_any_size_and_vmap():
    _, _, qparams, qapply = quantized("post", Block(), X)
    native = qapply.with_backend("native")
    whole = native(qparams, X)
    assert native(qparams, X[:0]).shape == (0, 12, 16)
    np.testing.assert_array_equal(native(qparams, X[1:2])[0], whole[1])
    each = jax.vmap(native, (None, 0))(qparams, X[:, None])
    np.testing.assert_array_equal(each[:, 0], whole)


def test_the_gradient_is_that_of_the_equations():
    _, _, qparams, qapply = quantized("weights", Block(), X)

    def gradient(backend: str) -> jax.Array:
        model = qapply.with_backend(backend)
        return jax.grad(lambda x: jnp.square(model(qparams, x)).sum())(jnp.asarray(X))

    np.testing.assert_allclose(gradient("native"), gradient("xla"), rtol=1e-4, atol=1e-5)
