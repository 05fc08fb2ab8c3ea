"""The forms of each network of text give the same, and decoding by a cache what the whole gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.models import decoder, transformer, transformer_nnx
from experiments.models.tagger import CELLS, Tagger
from experiments.models.transformer import Transformer

SETTINGS = {"vocabulary": 11, "layers": 2, "width": 8, "heads": 2, "hidden": 12, "length": 9}


@pytest.fixture(scope="module")
def params():
    ids = jnp.zeros((1, 9), jnp.int32)
    return jax.jit(Transformer(**SETTINGS).init)(jax.random.key(0), ids)["params"]


@pytest.fixture
def ids(rng):
    return jnp.asarray(rng.integers(0, 11, (2, 9)), jnp.int32)


def logits(params, ids, **settings):
    return jax.jit(Transformer(**SETTINGS, **settings).apply)({"params": params}, ids)


def nnx_logits(model, ids):
    graph, state = nnx.split(model)
    return jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, ids)


def test_scanned_and_unrolled_layers_in_linen_and_nnx_give_the_same(params, ids):
    expected = logits(params, ids)
    loop = transformer.unstack(params)
    assert expected.shape == (2, 9, 11)
    close = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(logits(loop, ids, scanned=False), expected, **close)
    scanned = transformer_nnx.from_linen(params, **SETTINGS)
    np.testing.assert_allclose(nnx_logits(scanned, ids), expected, **close)
    unrolled = transformer_nnx.from_linen(loop, **SETTINGS, scanned=False)
    np.testing.assert_allclose(nnx_logits(unrolled, ids), expected, **close)


def test_stacked_layers_are_in_their_order():
    layers = {f"layers_{i}": {"bias": jnp.full(2, i)} for i in range(12)}
    stacked = transformer.stack({**layers, "head": jnp.ones(1)})
    np.testing.assert_array_equal(stacked["layers"]["bias"][:, 0], np.arange(12))
    assert stacked.keys() == {"head", "layers"}
    unstacked = transformer.unstack(stacked)
    assert unstacked.keys() == {"head", *layers}
    np.testing.assert_array_equal(unstacked["layers_11"]["bias"], [11, 11])


def test_a_later_token_changes_no_earlier_logits(params, ids):
    changed = ids.at[:, 5].set((ids[:, 5] + 1) % 11)
    before, after = logits(params, ids), logits(params, changed)
    np.testing.assert_allclose(after[:, :5], before[:, :5], atol=1e-5)
    assert np.abs(after[:, 5:] - before[:, 5:]).max() > 0.01


def test_decoding_with_a_cache_takes_the_token_that_the_whole_text_gives(params, ids):
    model = Transformer(**SETTINGS, decode=True)
    found = jax.jit(lambda p, x: decoder.generate(model, p, x, 9))(params, ids[:, :3])
    np.testing.assert_array_equal(found[:, :3], ids[:, :3])
    whole = logits(params, found)
    np.testing.assert_array_equal(jnp.argmax(whole, axis=-1)[:, 2:-1], found[:, 3:])


@pytest.mark.parametrize("length", [2, 10])
def test_a_text_that_does_not_fit_is_refused(params, ids, length):
    with pytest.raises(ValueError, match=f"length={length} .* 3 tokens of the prompt .* 9"):
        decoder.generate(Transformer(**SETTINGS, decode=True), params, ids[:, :3], length)


def test_tokens_are_drawn_by_a_key(params):
    model, prompt = Transformer(**SETTINGS, decode=True), jnp.zeros((100, 1), jnp.int32)

    @functools.partial(jax.jit, static_argnames="temperature")
    def sample(key, temperature):
        return decoder.generate(model, params, prompt, 3, temperature=temperature, key=key)

    first, second = jax.random.split(jax.random.key(0))
    drawn = np.asarray(sample(first, 2.0))
    np.testing.assert_array_equal(sample(first, 2.0), drawn)
    assert (sample(second, 2.0) != drawn).mean() > 0.4  # of which a third is the prompt
    # What comes first has the shares that the logits say.
    logits = jax.jit(Transformer(**SETTINGS).apply)({"params": params}, prompt[:1])
    shares = np.bincount(drawn[:, 1], minlength=11) / 100
    np.testing.assert_allclose(shares, jax.nn.softmax(logits[0, 0] / 2), atol=0.15)
    greedy = jax.jit(lambda: decoder.generate(model, params, prompt, 3))()
    np.testing.assert_array_equal(sample(first, 1e-4), greedy)


def test_a_temperature_that_is_not_above_0_is_refused(params, ids):
    model, key = Transformer(**SETTINGS, decode=True), jax.random.key(0)
    with pytest.raises(ValueError, match="temperature=0 is not above 0; without a key"):
        decoder.generate(model, params, ids, 9, temperature=0, key=key)


@pytest.mark.parametrize(
    "cell", ["lstm", *(pytest.param(c, marks=pytest.mark.slow) for c in CELLS if c != "lstm")]
)
def test_a_tagger_by_rnn_is_the_one_unrolled_by_hand(cell, ids):
    model = Tagger(11, 5, width=6, cell=cell)
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    scanned = jax.jit(model.apply)(variables, ids)
    assert scanned.shape == (2, 9, 5)
    unrolled = jax.jit(model.clone(unrolled=True).apply)(variables, ids)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-6)
