"""A weight that is used inside of loops and outside, or in several loops, is stored once."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks
from tests.loops import measure

LAYERS, WORDS, WIDTH = 3, 20, 8
PARAMS = {
    "table": jnp.asarray(networks.images(1, (WORDS, WIDTH))),
    "layers": jnp.asarray(networks.images(2, (LAYERS, WIDTH, WIDTH))) / 2,
    "two": jnp.asarray(networks.images(3, (WIDTH, WIDTH))) / 2,
}
IDS = jnp.arange(24).reshape(4, 6) % WORDS


def scanned(x, layers, reverse=False):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers, reverse=reverse)[0]


def generating(p, ids):
    """Layers that are scanned before and within a `while_loop`; the table is looked up and tied."""

    def step(carry):
        number, x = carry
        scores = scanned(x, p["layers"]) @ p["table"].T
        return number + 1, jnp.tanh(scores[..., :WIDTH]) @ p["two"]

    x = scanned(p["table"][ids], p["layers"], reverse=True) @ p["two"]
    return lax.while_loop(lambda carry: carry[0] < 2, step, (jnp.int32(0), x))[1]


def penalized(p, ids):
    """The scanned layers are read in float too, all and one of them."""
    x = scanned(p["table"][ids], p["layers"])
    return x + jnp.sum(jnp.square(p["layers"])) + jnp.sum(p["layers"][1], axis=0)


def nested(p, ids):
    """Both scans of a nest go over the same layers, each by steps of its own."""

    def outer(x, w):
        return jnp.tanh(scanned(x @ p["two"], p["layers"]) @ w), None

    return lax.scan(outer, p["table"][ids], p["layers"])[0]


STATIC = {
    generating: {"layers/int8": 1, "table/int8": 1, "two/int8": 1},
    penalized: {"layers/int8": 1, "table/int8": 1},
    nested: {"layers/int8": 1, "layers/int8_1": 1, "two/int8": 1, "table/int8": 1},
}


def weights(qparams):
    """The bytes per element of what is stored of the parameters, by path."""
    found = measure.flat(qparams["params"])
    return {path: x.dtype.itemsize for path, x in found.items() if "/scale" not in path}


@pytest.mark.parametrize("model", STATIC, ids=lambda model: model.__name__)
def test_static(model):
    qparams, qapply = jaxquant.quant_post(
        PARAMS, model, [(IDS,)], algo="abs_max", recover=(), progress=False
    )
    assert weights(qparams) == STATIC[model]
    assert measure.sqnr(model(PARAMS, IDS), qapply(qparams, IDS)) > 20


def test_the_integers_are_those_of_a_python_loop():
    def unrolled(p, ids):
        x = p["table"][ids]
        for number in range(LAYERS):
            x = jnp.tanh(x @ p[f"layers_{number}"])
        for number in range(LAYERS):
            x = jnp.tanh(x @ p[f"layers_{number}"])
        return x

    def twice(p, ids):
        return scanned(scanned(p["table"][ids], p["layers"]), p["layers"])

    options = {"algo": "abs_max", "recover": (), "progress": False}
    apart = {f"layers_{n}": layer for n, layer in enumerate(PARAMS["layers"])} | PARAMS
    expected, _ = jaxquant.quant_post(apart, unrolled, [(IDS,)], **options)
    found, _ = jaxquant.quant_post(PARAMS, twice, [(IDS,)], **options)
    for entry in ("int8", "scale"):
        each = [expected["params"][f"layers_{n}"][entry] for n in range(LAYERS)]
        np.testing.assert_array_equal(found["params"]["layers"][entry], np.stack(each))


def test_weights_alone():
    qparams, qapply = jaxquant.quant_weights(PARAMS, generating, (IDS,), progress=False)
    assert weights(qparams) == {"layers/int8": 1, "table/int8": 1, "two/int8": 1}
    assert measure.sqnr(generating(PARAMS, IDS), qapply(qparams, IDS)) > 20
