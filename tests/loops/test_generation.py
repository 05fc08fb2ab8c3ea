"""A greedy loop with a cache in `lax.while_loop`, against its int8 step called from Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from experiments.models import decoder
from experiments.models.transformer import Transformer
from tests.loops import measure

MODEL = Transformer(vocabulary=16, layers=2, width=8, heads=2, hidden=12, length=8, decode=True)
PROMPT = jnp.asarray([[3, 1], [7, 15], [0, 4]], jnp.int32)
BATCH, GIVEN = PROMPT.shape


def generate(params, prompt):
    return decoder.generate(MODEL, params, prompt, MODEL.length)


def step(params, ids, position, cache):
    return decoder.step(MODEL, params, ids, position, cache)


@functools.cache
def make_params():
    ids = jnp.zeros((1, MODEL.length), jnp.int32)
    params = jax.jit(MODEL.clone(decode=False).init)(jax.random.key(1), ids)["params"]
    return jax.tree.map(lambda leaf: leaf * 2, params)  # logits far enough from each other


def from_python(call):
    """The tokens, and the arguments of each call of a step."""
    ids = np.zeros((BATCH, MODEL.length), np.int32)
    ids[:, :GIVEN] = PROMPT
    cache, calls = decoder.empty_cache(MODEL, BATCH), []
    for position in range(MODEL.length - 1):
        calls.append((jnp.asarray(ids[:, position]), jnp.asarray(position, jnp.int32), cache))
        logits, cache = call(*calls[-1])
        if position + 1 >= GIVEN:
            ids[:, position + 1] = np.argmax(logits, axis=-1)
    return ids, calls


def static(params, calls, **config):
    config = {"algo": "abs_max", "recover": (), "progress": False, **config}
    return (
        jaxquant.quant_post(params, generate, [PROMPT], **config),
        jaxquant.quant_post(params, step, calls, allow_batch_dependence=True, **config),
    )


def without_data(quantize, params, calls, **config):
    return (
        quantize(params, generate, measure.shapes(PROMPT), progress=False, **config),
        quantize(params, step, measure.shapes(calls[0]), progress=False, **config),
    )


MODES: dict[str, Any] = {
    "8 bits": functools.partial(without_data, jaxquant.quant_weights),
    "dynamic": functools.partial(without_data, jaxquant.quant_dynamic),
    "static": static,
}


def statuses_of_dots(qapply):
    rows = [row for row in qapply.report().rows if row["kind"] in ("mul", "matmul")]
    return {row["name"]: row["status"] for row in rows}


@functools.cache
def float_calls():
    """The arguments of each call of the step in float, whose tokens the loop gives too."""
    params = make_params()
    expected, calls = from_python(jax.jit(functools.partial(step, params)))
    np.testing.assert_array_equal(jax.jit(generate)(params, PROMPT), expected)
    return calls


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_gives_the_tokens_of_its_step_called_from_python(mode):
    (looped, generate_int8), (single, step_int8) = MODES[mode](make_params(), float_calls())
    assert statuses_of_dots(generate_int8) == statuses_of_dots(step_int8)
    one_step = jax.jit(step_int8)
    tokens, _ = from_python(lambda *arguments: one_step(single, *arguments))
    np.testing.assert_array_equal(jax.jit(generate_int8)(looped, PROMPT), tokens)
    assert (tokens[:, GIVEN:] != tokens[:, GIVEN : GIVEN + 1]).any()  # not one token for ever
