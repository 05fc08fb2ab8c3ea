"""What a loop reads slice by slice: weights make layers, other parameters do not."""

import jax.numpy as jnp
import numpy as np
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


def test_layers_picked_by_the_number_of_the_step_have_the_bits_of_scanned_ones():
    params = {
        "kernel": networks.images(1, (LAYERS, WIDTH, WIDTH)) / 2,
        "bias": networks.images(2, (LAYERS, WIDTH)) / 4,
    }

    def scanned(p, x):
        return lax.scan(lambda x, q: (jnp.tanh(x @ q["kernel"] + q["bias"]), None), x, p)[0]

    def picked(p, x):
        return lax.fori_loop(0, LAYERS, lambda i, x: jnp.tanh(x @ p["kernel"][i] + p["bias"][i]), x)

    (expected, apply_scanned), (found, apply_picked) = (
        jaxquant.quant_post(params, apply_fn, [X], **OPTIONS) for apply_fn in (scanned, picked)
    )
    measure.assert_same_numbers(measure.flat(found), measure.flat(expected))
    np.testing.assert_array_equal(apply_picked(found, X), apply_scanned(expected, X))


def test_a_weight_that_is_picked_by_what_the_model_computes_is_float_for_that_reason():
    params = {"experts": networks.images(1, (LAYERS, WIDTH, WIDTH)) / 2, "one": jnp.eye(WIDTH)}

    def apply_fn(p, x):
        number = jnp.argmax(x[0]) % LAYERS
        return x @ p["experts"][number] @ p["one"]

    for quantize in (jaxquant.quant_dynamic, jaxquant.quant_weights):
        _, qapply = quantize(
            params, apply_fn, measure.shapes(X), allow_batch_dependence=True, progress=False
        )
        picked, one = qapply.report().rows
        assert (picked["status"], one["status"]) == ("float", "int8")
        assert picked["reason"].startswith("its weight is picked from 'experts' by a number")
