"""NaN that int8 hides comes out in the rows where the float model has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks
from tests.plan.full import quantize as quantize_full

N, D = 6, 4
KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {name: 0.4 * jax.random.normal(KEYS[k], (D, D)) for k, name in enumerate("abcd")}
X = jax.random.normal(KEYS[4], (N, D))
K = 0.4 * jax.random.normal(KEYS[5], (3, D, D))

# Of sequences without a batch: what moves rows one by one, and what reaches several of them.
MOVES = {
    "turned around": lambda x: jnp.flip(x, 0),
    "rolled": lambda x: jnp.roll(x, 1, 0),
    "picked": lambda x: x[np.array([3, 1, 0, 5, 4, 2])],
    "shifted": lambda x: jnp.concatenate([jnp.zeros((1, D)), x[:-1]]),
    "padded": lambda x: jnp.pad(x, ((2, 0), (0, 0)))[:N],
    "with its last": lambda x: x + lax.dynamic_slice(x, (N - 1, 0), (1, D)),
    "centred": lambda x: x - x.mean(0),
    "summed up": lambda x: 0.3 * jnp.cumsum(x, 0),
    "sorted": lambda x: lax.sort(x, dimension=0),
    "written": lambda x: lax.dynamic_update_slice(jnp.zeros((N, D)), x[:4], (1, 0)),
    "replaced": lambda x: x.at[3].set(0.5),
    "pooled": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1), (1, 1), "SAME"),
    "convolved": lambda x: lax.conv_general_dilated(
        x[None], K, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[0],
    "attended": lambda x: jax.nn.softmax(x @ x.T) @ x,
    "read backwards": lambda x: lax.scan(
        lambda h, y: (jnp.tanh(0.3 * h + y),) * 2, jnp.zeros(D), x, reverse=True
    )[1],
}


def sequence(names):
    """A model with a dot between any two moves."""

    def apply_fn(p, x):
        for weight, name in zip("abcd", (*names, "")):
            x = jnp.tanh(x @ p[weight])
            x = MOVES[name](x) if name else x
        return x

    return apply_fn


def nan_by_row(apply, params):
    """Which rows of the outputs are NaN, by the row of the input that is."""
    inputs = jnp.stack([X.at[row, 1].set(jnp.nan) for row in range(N)])
    outputs = jax.jit(lambda params, inputs: [apply(params, x) for x in inputs])(params, inputs)
    return np.isnan(np.stack(outputs)).any(axis=-1).astype(int)


ORDERS = np.random.default_rng(0).permuted(np.tile([*MOVES], (3, 1)), axis=1).reshape(-1, 3)


@pytest.mark.parametrize("names", ORDERS[:5].tolist(), ids=" ".join)
def test_random_sequences(names):
    apply_fn = sequence(names)
    qparams, qapply = networks.quantize(PARAMS, apply_fn, X)
    want = nan_by_row(apply_fn, PARAMS)
    np.testing.assert_array_equal(nan_by_row(qapply.with_backend("xla"), qparams), want)


@pytest.mark.parametrize("names", ORDERS[5:9].tolist(), ids=" ".join)
def test_random_sequences_in_full_mode(names):
    """What is moved in int8 may give NaN to more rows, never to fewer."""
    apply_fn = sequence([name for name in names if name != "read backwards"])
    model = quantize_full(apply_fn, PARAMS, X)
    got = nan_by_row(model.qapply.with_backend("xla"), model.qparams)
    np.testing.assert_array_equal(got, np.maximum(got, nan_by_row(apply_fn, PARAMS)))


@pytest.mark.parametrize("name", ["turned around", "rolled", "picked", "shifted", "padded"])
def test_what_moves_in_int8(name):
    apply_fn = sequence([name])
    model = quantize_full(apply_fn, PARAMS, X)
    got = nan_by_row(model.qapply.with_backend("xla"), model.qparams)
    np.testing.assert_array_equal(got, nan_by_row(apply_fn, PARAMS))


B, T = 3, 4
BATCH = jax.random.normal(KEYS[3], (B, T, D))


def windows(p, x):
    """Rows of samples and windows, of whose entries the logarithm is taken."""
    y = (x @ p["a"]).reshape(-1, 2, D)
    y = jax.nn.softmax(jnp.einsum("btd,bsd->bts", y, y)) @ y
    return (jnp.log1p(jnp.abs(y)) @ p["b"]).reshape(x.shape)


def dispatched(p, x):
    """Rows that go to their expert, and back."""
    y = x.reshape(-1, D) @ p["a"]
    order = jnp.argsort(jnp.argmax(y[:, :3], axis=-1))
    y = jnp.tanh(y[order] @ p["b"])
    return (jnp.zeros_like(y).at[order].add(y) @ p["c"]).reshape(x.shape)


def both_halves(p, x):
    """The samples twice, one after the other, as for an average over two views."""
    y = jax.nn.relu(jnp.concatenate([x, x[:, ::-1]]) @ p["a"]) @ p["b"]
    return sum(jnp.split(y, 2))


def layers(p, x):
    stack = jnp.stack([p["b"], p["c"]])
    y, _ = lax.scan(lambda y, w: (y + jnp.tanh(y @ w), None), x @ p["a"], stack)
    return y.mean(1) @ p["d"]


def scalars(p, x):
    """One number for each sample, as the time of a diffusion."""
    return jnp.sin(x[:, 0, 0][:, None] * jnp.arange(1.0, D + 1)) @ p["a"]


def spectrum(p, x):
    return jnp.abs(jnp.fft.fft(x @ p["a"], axis=1)) @ p["b"]


@pytest.mark.parametrize("is_full", [False, True])
@pytest.mark.parametrize("apply_fn", [windows, dispatched, both_halves, layers, scalars, spectrum])
def test_the_bad_sample_of_a_batch_alone(apply_fn, is_full):
    qparams, qapply = jaxquant.quant_post(
        PARAMS, apply_fn, [BATCH], progress=False, recover=(), is_full_quantize=is_full
    )
    got = np.isnan(jax.jit(qapply)(qparams, BATCH.at[1, 0, 0].set(jnp.nan))).reshape(B, -1)
    assert got.any(axis=1).tolist() == [False, True, False]


def test_a_nan_that_the_model_replaces_does_not_come_out():
    """Nor where another reader has quantized it."""

    def apply_fn(p, x):
        y = jnp.nan_to_num(x)
        return x @ p["a"], y @ p["b"], jnp.nan_to_num(x @ p["c"]) @ p["d"]

    qparams, qapply = networks.quantize(PARAMS, apply_fn, X)
    for got, rows in zip(qapply(qparams, X.at[2, 0].set(jnp.nan)), ([2], [], []), strict=True):
        assert np.flatnonzero(np.isnan(got).any(axis=1)).tolist() == rows
