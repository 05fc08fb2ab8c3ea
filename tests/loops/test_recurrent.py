"""Recurrent cells in loops of Flax, Haiku, Equinox and JAX, against the same unrolled by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from experiments.models.tagger import Tagger
from tests.loops import measure

BATCH, LENGTH, WIDTH = 32, 3, 16
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


def haiku(cell):
    """An LSTM or GRU of Haiku in `dynamic_unroll`, and in `static_unroll`."""
    hk = pytest.importorskip("haiku")

    def network(unroll):
        def run(x):
            core = getattr(hk, cell)(WIDTH)
            states, _ = unroll(core, x.swapaxes(0, 1), core.initial_state(x.shape[0]))
            return hk.Linear(7)(states.swapaxes(0, 1))

        return hk.without_apply_rng(hk.transform(run))

    scanned = network(hk.dynamic_unroll)
    params = jax.jit(scanned.init)(jax.random.key(0), X)
    return params, X, scanned.apply, network(hk.static_unroll).apply


def equinox(cell):
    """A cell of Equinox in `lax.scan`; its arrays are the parameters."""
    eqx = pytest.importorskip("equinox")
    module = {
        "cell": getattr(eqx.nn, cell)(WIDTH, WIDTH, key=jax.random.key(0)),
        "head": eqx.nn.Linear(WIDTH, 7, key=jax.random.key(1)),
    }
    params, static = eqx.partition(module, eqx.is_array)

    def step(p, state, x):
        state = jax.vmap(eqx.combine(p, static)["cell"])(x, state)
        return state, state[0] if isinstance(state, tuple) else state

    def start(x):
        zeros = jnp.zeros((x.shape[0], WIDTH), x.dtype)
        return (zeros, zeros) if cell == "LSTMCell" else zeros

    def head(p, states):
        return jax.vmap(jax.vmap(eqx.combine(p, static)["head"]))(states.swapaxes(0, 1))

    def scanned(p, x):
        _, states = lax.scan(lambda state, x: step(p, state, x), start(x), x.swapaxes(0, 1))
        return head(p, states)

    def by_hand(p, x):
        state, states = start(x), []
        for number in range(LENGTH):
            state, hidden = step(p, state, x[:, number])
            states.append(hidden)
        return head(p, jnp.stack(states))

    return params, X, scanned, by_hand


CELLS = {
    "gru": lambda: tagger("gru"),
    "optimized_lstm": lambda: tagger("optimized_lstm"),
    "plain": plain,
    "lstm": lambda: tagger("lstm"),
    "haiku gru": lambda: haiku("GRU"),
    "haiku lstm": lambda: haiku("LSTM"),
    "equinox gru": lambda: equinox("GRUCell"),
    "equinox lstm": lambda: equinox("LSTMCell"),
}
SOME = [pytest.param(name, marks=pytest.mark.slow if "lstm" in name else ()) for name in CELLS]


def share_in_int8(qapply, params) -> float:
    """Of the multiplications: each weight is in one product a step, that of the loop in all."""
    done, leaves = {"int8": 0, "float": 0}, measure.flat(params)
    for row in qapply.report().rows:
        done[row["status"]] += math.prod(leaves[row["weight_path"]].shape)
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
