"""The forms of the Llama give the same, and decoding by its cache what the whole text gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from experiments.models import decoder, llama, llama_nnx, transformer
from experiments.models.llama import Llama

SETTINGS = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 4, "groups": 2, "hidden": 12}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def params():
    return make_params(Llama(**SETTINGS))


def make_params(model):
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))["params"]


@pytest.fixture
def ids(rng):
    return jnp.asarray(rng.integers(0, 11, (2, 9)), jnp.int32)


def logits(params, ids, **settings):
    return jax.jit(Llama(**SETTINGS, **settings).apply)({"params": params}, ids)


def nnx_logits(params, ids, **settings):
    graph, state = nnx.split(llama_nnx.from_linen(params, **SETTINGS, **settings))
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)


def test_scanned_and_unrolled_layers_in_linen_and_nnx_give_the_same(params, ids):
    expected = logits(params, ids)
    loop = transformer.unstack(params)
    assert expected.shape == (2, 9, 11)
    np.testing.assert_allclose(logits(loop, ids, scanned=False), expected, **CLOSE)
    np.testing.assert_allclose(nnx_logits(params, ids), expected, **CLOSE)
    np.testing.assert_allclose(nnx_logits(loop, ids, scanned=False), expected, **CLOSE)


def test_a_head_of_its_own_gives_the_logits_that_a_tied_one_gives_by_the_same_table(params, ids):
    untied = {**params, "head": {"kernel": params["tokens"]["embedding"].T}}
    shapes = jax.tree.map(jnp.shape, make_params(Llama(**SETTINGS, tied=False)))
    assert shapes == jax.tree.map(jnp.shape, untied)
    expected = logits(params, ids)
    np.testing.assert_allclose(logits(untied, ids, tied=False), expected, **CLOSE)
    np.testing.assert_allclose(nnx_logits(untied, ids, tied=False), expected, **CLOSE)


def test_what_a_query_finds_depends_on_distances_alone(rng):
    query, key = (jnp.asarray(rng.normal(size=(1, 3, 1, 8)), jnp.float32) for _ in range(2))

    def scores(start):
        given = llama.context(start, tokens=3, keys=3, features=8)
        turned = llama.rotated(query, given), llama.rotated(key, given)
        return jnp.einsum("bqhe,bkhe->qk", *turned)

    np.testing.assert_allclose(scores(5), scores(0), **CLOSE)
    np.testing.assert_allclose(scores(0)[0, 0], (query[0, 0, 0] * key[0, 0, 0]).sum(), **CLOSE)
    assert np.abs(scores(0) - jnp.einsum("bqhe,bkhe->qk", query, key)).max() > 0.1


def test_grouped_queries_are_those_with_repeated_keys_and_values(rng):
    def draw(heads):
        return jnp.asarray(rng.normal(size=(2, 3, heads, 4)), jnp.float32)

    query, key, value, mask = draw(4), draw(2), draw(2), jnp.tril(jnp.ones((3, 3), bool))
    repeated = (jnp.repeat(x, 2, axis=2) for x in (key, value))
    expected = jax.nn.dot_product_attention(query, *repeated, mask=mask[None, None])
    np.testing.assert_allclose(llama.attend(query, key, value, mask), expected, **CLOSE)


def test_decoding_with_a_cache_takes_the_token_that_the_whole_text_gives(params, ids):
    model = Llama(**SETTINGS, length=9, decode=True)
    found = jax.jit(lambda p, x: decoder.generate(model, p, x, 9))(params, ids[:, :3])
    np.testing.assert_array_equal(found[:, :3], ids[:, :3])
    whole = logits(params, found)
    np.testing.assert_array_equal(jnp.argmax(whole, axis=-1)[:, 2:-1], found[:, 3:])


def test_a_prompt_in_one_call_leaves_the_cache_of_its_tokens_one_by_one(params, ids):
    model = Llama(**SETTINGS, length=9, decode=True)

    @jax.jit
    def call(cache, tokens, start):
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens, start, mutable=["cache"])[1]["cache"]

    empty = cache = decoder.empty_cache(model, 2)
    at_once = call(empty, ids[:, :3], jnp.asarray(0, jnp.int32))
    for position in range(3):
        cache = call(cache, ids[:, position, None], jnp.asarray(position, jnp.int32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), at_once, cache)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_in_nnx_it_is_quantized(params, rng):
    """All dots with a weight and the tied table are int8, in the scan over layers too."""
    texts = [jnp.asarray(rng.integers(0, 11, (4, 9)), jnp.int32) for _ in range(2)]
    graph, state = nnx.split(llama_nnx.from_linen(params, **SETTINGS))
    qparams, qapply = jaxquant.quant_post(
        state, lambda state, ids: nnx.merge(graph, state)(ids), texts, progress=False
    )
    rows = [row for row in qapply.report().rows if row["kind"] in ("mul", "lookup_table")]
    assert len(rows) == 9
    assert {row["status"] for row in rows} == {"int8"}
    expected, found = logits(params, texts[0]), qapply(qparams, texts[0])
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
