"""Loops and choices, in ONNX Runtime against qapply; the batch differs from the export's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import agrees, behind_dot, ops, run, sqnr, weights
from tests.networks import images, quantize, random_params

onnx = pytest.importorskip("onnx")
SHAPE = (3, 5, 4)


def lstm(x, p=None):
    p = {"i": weights(4, 24), "h": weights(6, 24, seed=8), "b": weights(24, seed=9)}

    def step(carry, now):
        h, c = carry
        i, f, g, o = jnp.split(now @ p["i"] + h @ p["h"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zeros = jnp.zeros((x.shape[0], 6))
    (last, _), every = lax.scan(step, (zeros, zeros), x.swapaxes(0, 1))
    return last, every.swapaxes(0, 1)


LOOPS = {
    "lstm": lstm,
    "backwards": lambda x: lax.scan(
        lambda c, y: (c * 0.5 + y, c), x[:, 0], x.swapaxes(0, 1), reverse=True
    ),
    "nothing carried": lambda x: lax.map(lambda y: jnp.tanh(y) * 2, x),
    "nothing stacked": lambda x: lax.scan(lambda c, y: (c + y, None), x[:, 0], x.swapaxes(0, 1)),
    "counted": lambda x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c) + i, x),
    "unrolled": lambda x: lax.scan(lambda c, y: (c - y, c), x[:, 0], x.swapaxes(0, 1), unroll=2),
    "layers": lambda x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights(3, 4, 4))[0],
    "nested": lambda x: lax.map(lambda y: lax.scan(lambda c, z: (c + z, c), y[0], y)[1], x),
    "while": lambda x: lax.while_loop(
        lambda c: (c[0] < 4) & (c[1].sum() < 50), lambda c: (c[0] + 1, c[1] * 1.5), (0, x)
    ),
    "choice": lambda x: lax.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, x),
    "other choice": lambda x: lax.cond(x.sum() < 0, lambda y: y * 2, lambda y: y, x),
    "one of three": lambda x: [
        lax.switch(jnp.argmax(x[0, 0]) % 3 + k, [jnp.sin, jnp.cos, lambda y: y * 2], x)
        for k in (-1, 0, 1)
    ],
}


def test_loops_and_choices(tmp_path):
    agrees(tmp_path, {"a": weights(4, 4)}, behind_dot(LOOPS, False), images(0, SHAPE))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.LSTMCell(6), name="lstm")(nn.Dense(8, name="in")(x))
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.GRUCell(4)))(x)
        return nn.Dense(3, name="out")(x)


def test_flax_recurrent_layers_of_any_length(tmp_path):
    apply_fn, x = Recurrent().apply, images(0, (2, 5, 4))
    params = random_params(lambda: Recurrent().init(jax.random.key(0), x))
    qparams, qapply = quantize(params, apply_fn, x)
    path = tmp_path / "m.onnx"
    jaxquant.export_onnx(path, qparams, qapply, shapes="b, s, 4", constraints=("s >= 2",))
    for shape in ((1, 3, 4), (4, 8, 4)):
        x = images(1, shape)
        assert sqnr(qapply(qparams, x), run(path, x)[0]) > 45


def test_a_loaded_model_knows_its_loops(tmp_path):
    def apply_fn(p, x):
        table = jnp.asarray(np.arange(8.0).reshape(2, 4), jnp.float32)
        body = lambda c, y: (c @ p["w"] + y * table[0], c)  # noqa: E731
        return lax.scan(body, x[:, 0] @ p["v"], x.swapaxes(0, 1))[0]

    params = {"v": weights(4, 4), "w": weights(4, 4, seed=8)}
    qparams, qapply = quantize(params, apply_fn, images(0, SHAPE))
    jaxquant.save_quantized_model(tmp_path / "m", qparams, qapply)
    jaxquant.export_onnx(tmp_path / "a.onnx", qparams, qapply)
    jaxquant.export_onnx(tmp_path / "b.onnx", *jaxquant.load_quantized_model(tmp_path / "m"))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    x = images(1, SHAPE)
    assert sqnr(qapply(qparams, x), run(tmp_path / "b.onnx", x)[0]) > 45
    assert "Scan" in ops(onnx.load(tmp_path / "b.onnx"))
