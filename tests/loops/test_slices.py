"""What a loop reads slice by slice: weights make layers, other parameters do not."""

import jax.numpy as jnp
from jax import lax

import jaxquant
from tests import networks
from tests.loops import measure

LAYERS, WIDTH = 3, 8
X = networks.images(0, (4, WIDTH))
OPTIONS = {"algo": "abs_max", "recover": (), "progress": False}


def test_stacked_biases_beside_one_weight_make_no_layers():
    params = {
        "kernel": networks.images(1, (WIDTH, WIDTH)) / 2,
        "biases": 4 * networks.images(2, (LAYERS, WIDTH)),
    }

    def apply_fn(p, x):
        def step(x, bias):
            return jnp.tanh(x @ p["kernel"] + bias), None

        return lax.scan(step, x, p["biases"])[0]

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [X], **OPTIONS)
    assert qparams["tensors"]["kernel/input"]["scale"].shape == ()
    assert measure.sqnr(apply_fn(params, X), qapply(qparams, X)) > 30
