"""Recurrent cells in `nn.RNN` and in a plain `lax.scan`, against the same cell unrolled by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from experiments.models.tagger import Tagger
from tests.loops import measure

BATCH, LENGTH, WIDTH = 32, 4, 16
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (BATCH, LENGTH)), jnp.int32)
X = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32)


def tagger(cell):
    """(params, x, the loop, the same unrolled by hand) of a network of experiments/models."""
    model = Tagger(20, 7, width=WIDTH, cell=cell)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]

    def apply(model):
        return lambda params, ids: model.apply({"params": params}, ids)

    return params, IDS, apply(model), apply(model.clone(unrolled=True))


def plain():
    """An LSTM whose gates are one product of the input and the state side by side."""

    def cell(p, carry, x):
        state, hidden = carry
        gates = jnp.concatenate([x, hidden], axis=-1) @ p["cell"]["kernel"] + p["cell"]["bias"]
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        state = jax.nn.sigmoid(f + 1) * state + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(state)
        return (state, hidden), hidden

    def scanned(p, x):
        start = jnp.zeros((2, x.shape[0], WIDTH), x.dtype)
        _, states = lax.scan(lambda c, x: cell(p, c, x), (*start,), x.swapaxes(0, 1))
        return states.swapaxes(0, 1) @ p["head"]

    def by_hand(p, x):
        carry = (*jnp.zeros((2, x.shape[0], WIDTH), x.dtype),)
        states = []
        for step in range(LENGTH):
            carry, hidden = cell(p, carry, x[:, step])
            states.append(hidden)
        return jnp.stack(states, axis=1) @ p["head"]

    rng = np.random.default_rng(2)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)

    cell_params = {"kernel": normal(2 * WIDTH, 4 * WIDTH), "bias": jnp.zeros(4 * WIDTH)}
    return {"cell": cell_params, "head": normal(WIDTH, 7)}, X, scanned, by_hand


CELLS = {
    "gru": lambda: tagger("gru"),
    "optimized_lstm": lambda: tagger("optimized_lstm"),
    "plain": plain,
    "lstm": lambda: tagger("lstm"),
}
SOME = [pytest.param(name, marks=pytest.mark.slow if "lstm" in name else ()) for name in CELLS]


def share_in_int8(qapply, params) -> float:
    """Of the multiplications: each weight is in one product a step, that of the loop in all."""
    done = {"int8": 0, "float": 0}
    for row in qapply.report().rows:
        done[row["status"]] += math.prod(measure.leaf(params, row["weight_path"]).shape)
    return done["int8"] / sum(done.values())


@pytest.mark.parametrize("name", SOME)
def test_in_static_int8_a_loop_is_as_accurate_as_the_cell_by_hand(name):
    params, x, scanned, by_hand = CELLS[name]()
    reference = jax.jit(scanned)(params, x)
    found = []
    for apply_fn in (scanned, by_hand):
        qparams, qapply = jaxquant.quant_post(
            params, apply_fn, [x], algo="abs_max", recover=(), progress=False
        )
        assert share_in_int8(qapply, params) >= 0.95
        found.append(measure.sqnr(reference, jax.jit(qapply)(qparams, x)))
    loop, unrolled = found
    assert loop > max(unrolled - 1, 25)
