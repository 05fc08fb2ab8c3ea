"""Decoders, whose cache goes in and comes back: quantized in each mode, saved, called by steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.plain_trees import plain_tree, with_lists
from tests import decoders
from tests.deploy.models import same_bits

ONE_BY_ONE = (1,) * decoders.LENGTH


def sqnr(wanted, found):
    noise = jnp.square(wanted - found).sum()
    return float(10 * jnp.log10(jnp.square(wanted).sum() / noise))


def calibrated(model, counts=ONE_BY_ONE, **settings):
    """The int8 decoder, and its input."""
    params, cache, apply_fn = model
    float_apply = jax.jit(apply_fn)
    *_, given = decoders.decode(float_apply, params, cache, decoders.tokens(0, 8), counts)
    settings = {"algo": "abs_max", "recover": (), **settings}
    return jaxquant.quant_post(params, apply_fn, given, progress=False, **settings)


def dynamic(model):
    params, cache, apply_fn = model
    return jaxquant.quant_dynamic(
        params, apply_fn, [(cache, decoders.tokens(0, 1))], progress=False
    )


def weights(model):
    params, cache, apply_fn = model
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (cache, decoders.tokens(0, 1))
    )
    return jaxquant.quant_weights(params, apply_fn, shapes, progress=False)


@pytest.mark.parametrize(
    ("make", "quantize"),
    [
        (decoders.linen, weights),
        (decoders.nnx_, calibrated),
        (decoders.nnx_, dynamic),
        (decoders.plain, weights),
    ],
)
def test_steps_follow_the_float_model(make, quantize):
    model = params, cache, apply_fn = make()
    qparams, qapply = quantize(model)
    sequence = decoders.tokens(1, 8)
    wanted, state, _ = decoders.decode(jax.jit(apply_fn), params, cache, sequence, ONE_BY_ONE)
    found, int8_state, _ = decoders.decode(qapply, qparams, cache, sequence, ONE_BY_ONE)
    assert sqnr(wanted, found) > 15  # thresholds of one sequence of random tokens
    assert jax.tree.structure(state) == jax.tree.structure(int8_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(int8_state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jnp.integer):
            assert a == b == decoders.LENGTH


def test_prefill_and_steps_are_calibrated_together(tmp_path):
    params, cache, apply_fn = model = decoders.plain(rotary=True)
    counts = (4, 1, 2, 1)
    qparams, qapply = calibrated(model, counts, algo="KL", recover=("bias_correction",))
    sequence = decoders.tokens(1, 8)
    for feed in (counts, (1, 7)):
        wanted, *_ = decoders.decode(jax.jit(apply_fn), params, cache, sequence, feed)
        found, last, _ = decoders.decode(qapply, qparams, cache, sequence, feed)
        assert sqnr(wanted, found) > 20

    # One file of ONNX takes the prompt and the steps.
    pytest.importorskip("onnxruntime")
    from tests.deploy.onnx import runtime

    shapes = {name: "b, ..." if array.ndim else "" for name, array in cache.items()}, "b, s"
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, shapes=shapes)

    def run(path, *given):
        logits, *state = runtime.run(path, *given)
        return logits, jax.tree.unflatten(jax.tree.structure(cache), state)

    by_onnx, state, _ = decoders.decode(run, tmp_path / "m.onnx", cache, sequence, feed)
    assert sqnr(found, by_onnx) > 40
    assert state["index"] == last["index"] == decoders.LENGTH


def relative(p, tokens):
    """Attention that multiplies queries by rows of a table, by the distance of the keys."""
    at = jnp.arange(tokens.shape[1])
    x = p["embed"]["w"][tokens]
    rows = p["positions"]["w"][at[None, :] - at[:, None]]
    scores = x @ x.swapaxes(1, 2) + jnp.einsum("bqd,qkd->bqk", x, rows)
    return jax.nn.softmax(scores) @ x @ p["head"]["w"]


def test_a_weight_of_the_texts_length_is_computed_where_lengths_vary():
    params = decoders.plain_params()
    ds = [(decoders.tokens(k, n),) for k, n in enumerate((8, 5))]
    qparams, qapply = jaxquant.quant_post(
        params, relative, ds, algo="abs_max", recover=(), progress=False
    )
    (x,) = ds[0]
    wanted = relative(params, x[:, :3])
    assert sqnr(wanted, qapply(qparams, x[:, :3])) > 20
    assert qparams["params"]["positions"]["w"].dtype == jnp.float32

    qparams, qapply = jaxquant.quant_dynamic(params, relative, x, progress=False)
    with pytest.raises(ValueError, match=r"another graph .* sites positions differ"):
        qapply(qparams, x[:, :3])


@pytest.mark.parametrize("rotary", [False, True])
def test_texts_of_any_length_after_saving(rotary, tmp_path):
    """A table of positions cut at the length, or angles made of it; a mask by positions."""
    apply_fn = functools.partial(decoders.whole_sequence, rotary=rotary)
    inputs = decoders.tokens(0, 5), np.arange(5) < np.array([[5], [4]])
    qparams, qapply = jaxquant.quant_dynamic(
        decoders.plain_params(), apply_fn, [inputs], progress=False
    )
    shapes = {"shapes": ("b, s", "b, s")}
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply, **shapes)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    for batch, length in ((3, 8), (1, 1)):
        given = decoders.tokens(1, length, batch), np.ones((batch, length), bool)
        assert same_bits(apply(loaded, *given), qapply(qparams, *given))
    if not rotary:
        with pytest.raises(ValueError, match="saved for s <= 8"):
            apply(loaded, decoders.tokens(1, 9), np.ones((2, 9), bool))

    jaxquant.export_stablehlo(tmp_path / "e", qparams, qapply, **shapes)
    exported = jax.export.deserialize(bytearray((tmp_path / "e").read_bytes()))
    np.testing.assert_allclose(exported.call(qparams, *given), qapply(qparams, *given), atol=1e-4)


def test_prompts_of_any_length_after_saving(tmp_path):
    params, cache, apply_fn = decoders.plain()
    given = cache, decoders.tokens(0, 3)
    qparams, qapply = jaxquant.quant_dynamic(params, apply_fn, [given], progress=False)
    shapes = {name: "b, ..." if array.ndim else "" for name, array in cache.items()}, "b, s"
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply, shapes=shapes)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    model, saved = (
        decoders.decode(*both, decoders.plain_cache(1), decoders.tokens(2, 8, 1), (5, 1, 2))[:2]
        for both in ((qapply, qparams), (apply, loaded))
    )
    assert same_bits(saved, model)


def test_a_linen_decoder_is_saved_with_a_batch_that_varies(tmp_path):
    model = decoders.linen()
    qparams, qapply = weights(model)
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    # Counters have no batch; the rest has.
    cache = jax.tree.map(lambda x: jnp.repeat(x[:1], 3, 0) if x.ndim else x, model[1])
    given = cache, decoders.tokens(2, 1, batch=3)
    assert same_bits(apply(loaded, *given), qapply(qparams, *given))


def test_the_state_of_an_nnx_decoder_is_a_dict_in_a_file(tmp_path):
    _, state, _ = model = decoders.nnx_()
    qparams, qapply = weights(model)
    sequence, counts = decoders.tokens(3, 3), (1, 1, 1)
    wanted, last, _ = decoders.decode(qapply, qparams, state, sequence, counts)
    last = plain_tree(last)

    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "m")
    found, cache, _ = decoders.decode(apply, loaded, plain_tree(state), sequence, counts)
    assert same_bits((found, cache), (wanted, last))

    jaxquant.export_stablehlo(tmp_path / "e", qparams, qapply)
    exported = jax.export.deserialize(bytearray((tmp_path / "e").read_bytes()))
    start = with_lists(plain_tree(state))
    found, cache, _ = decoders.decode(exported.call, qparams, start, sequence, counts)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert jax.tree.structure(cache) == jax.tree.structure(start)


def test_a_cache_that_is_not_mutable_says_how_to_hand_it_on():
    params, cache, _ = decoders.linen()

    def forgets(params, cache, tokens):
        return decoders.LinenDecoder().apply({**params, "cache": cache}, tokens)

    with pytest.raises(ValueError, match=r"mutable=\['cache'\]"):
        jaxquant.quant_dynamic(params, forgets, [(cache, decoders.tokens(0, 1))])
