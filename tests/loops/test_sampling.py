"""A loop that carries a PRNG key and draws its tokens, against the float one with the same key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from experiments.models import decoder
from experiments.models.transformer import Transformer
from tests.loops import measure

MODEL = Transformer(vocabulary=16, layers=2, width=8, heads=2, hidden=12, length=6, decode=True)
PROMPT = jnp.asarray(np.random.default_rng(0).integers(0, 16, (16, 1)), jnp.int32)
KEY = jax.random.key(5)
QUIET = {"progress": False}


def sample(params, prompt, key=KEY):
    return decoder.generate(MODEL, params, prompt, MODEL.length, temperature=0.7, key=key)


@functools.cache
def make_params():
    ids = jnp.zeros((1, MODEL.length), jnp.int32)
    return jax.jit(MODEL.clone(decode=False).init)(jax.random.key(1), ids)["params"]


@functools.cache
def drawn_in_float():
    return np.asarray(jax.jit(sample)(make_params(), PROMPT))


def assert_drawn_alike(tokens):
    assert (tokens == drawn_in_float()).mean() > 0.7
    other = jax.jit(sample)(make_params(), PROMPT, jax.random.key(6))
    assert (tokens == other).mean() < 0.5  # by another key they are others


def test_static_tokens_are_those_of_float_and_of_the_saved_model(tmp_path):
    """A file has a batch that varies, and sizes of it inside the body of its loop."""
    config = {"algo": "abs_max", "recover": (), **QUIET}
    qparams, qapply = jaxquant.quant_post(make_params(), sample, [PROMPT], **config)
    tokens = np.asarray(qapply(qparams, PROMPT))
    assert_drawn_alike(tokens)
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply, **QUIET)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    np.testing.assert_array_equal(apply(loaded, PROMPT), tokens)


def test_dynamic_tokens_by_a_key_among_the_inputs():
    given = PROMPT, KEY
    qparams, qapply = jaxquant.quant_dynamic(make_params(), sample, [given], **QUIET)
    assert_drawn_alike(np.asarray(qapply(qparams, *given)))


def test_tokens_by_weights_of_8_bits_and_why_onnx_cannot_draw_them(tmp_path):
    shapes = measure.shapes(PROMPT)
    qparams, qapply = jaxquant.quant_weights(make_params(), sample, shapes, **QUIET)
    assert_drawn_alike(np.asarray(qapply(qparams, PROMPT)))
    with pytest.raises(ValueError, match=r"draws random numbers by a PRNG key .* one step of the"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, **QUIET)


@pytest.mark.parametrize("is_raw", [False, True])
def test_a_key_among_the_inputs_is_refused_by_name(is_raw, tmp_path):
    """Of the keys of `jax.random.key`, and of arrays that become one in the model."""

    def noisy(params, x, key):
        if is_raw:
            key = jax.random.wrap_key_data(key)
        return x @ params["w"] + jax.random.normal(key, (2,))

    key = jax.random.key_data(KEY) if is_raw else KEY
    given = jnp.ones((3, 4), jnp.float32), key
    params = {"w": jnp.ones((4, 2), jnp.float32)}
    qparams, qapply = jaxquant.quant_dynamic(params, noisy, [given], **QUIET)
    where = "'random_wrap', .*test_sampling" if is_raw else "an input"
    shapes = "b, 4", "2" if is_raw else ""
    with pytest.raises(ValueError, match=rf"PRNG key \(.*{where}.* draw where the file is run"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, shapes=shapes, **QUIET)
