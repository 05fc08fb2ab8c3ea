"""What is done with a quantized model that holds loops: files, exports, transformations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jaxquant
from tests import networks
from tests.loops import measure

LAYERS, WIDTH = 3, 8
X = networks.images(1, (4, WIDTH))
FACTOR = networks.images(2, (4, WIDTH))
PARAMS = {
    "layers": {
        "kernel": networks.images(3, (LAYERS, WIDTH, WIDTH)) / 2,
        "bias": networks.images(4, (LAYERS, WIDTH)) / 4,
    },
    "again": networks.images(5, (WIDTH, WIDTH)) / 2,
}


def apply_fn(params, x, factor):
    """Layers that are scanned, a `while_loop` over one weight, a factor in float."""

    def layer(x, layer):
        return jnp.tanh(x @ layer["kernel"] + layer["bias"]), None

    x, _ = lax.scan(layer, x, params["layers"])
    start = jnp.zeros((), jnp.int32), x
    _, x = lax.while_loop(
        lambda carry: carry[0] < 2,
        lambda carry: (carry[0] + 1, jnp.tanh(carry[1] @ params["again"])),
        start,
    )
    return x * factor


MODES: dict[str, Any] = {
    "static": lambda: jaxquant.quant_post(
        PARAMS, apply_fn, [(X, FACTOR)], algo="abs_max", recover=(), progress=False
    ),
    "dynamic": lambda: jaxquant.quant_dynamic(
        PARAMS, apply_fn, measure.shapes((X, FACTOR)), progress=False
    ),
    "4 bits": lambda: jaxquant.quant_weights(
        PARAMS, apply_fn, measure.shapes((X, FACTOR)), weight_bits=4, progress=False
    ),
}


@pytest.fixture(scope="module", params=MODES)
def model(request):
    qparams, qapply = MODES[request.param]()
    assert [row["status"] for row in qapply.report().rows] == ["int8"] * 2
    return qparams, qapply, qapply(qparams, X, FACTOR)


def test_a_saved_model_computes_the_same(model, tmp_path):
    qparams, qapply, expected = model
    path = tmp_path / "model.safetensors"
    jaxquant.save_quantized_model(path, qparams, qapply)
    loaded, load_apply = jaxquant.load_quantized_model(path)
    measure.assert_same_numbers(measure.flat(loaded), measure.flat(qparams))
    np.testing.assert_array_equal(load_apply(loaded, X, FACTOR), expected)
    assert str(load_apply.report()) == str(qapply.report())


def test_stablehlo_keeps_the_loops_and_computes_the_same(model, tmp_path):
    qparams, qapply, expected = model
    path = tmp_path / "model.stablehlo"
    jaxquant.export_stablehlo(path, qparams, qapply, progress=False)
    exported = export.deserialize(bytearray(path.read_bytes()))
    assert exported.mlir_module().count("stablehlo.while") >= 2  # int4 is read row by row in others
    np.testing.assert_allclose(exported.call(qparams, X, FACTOR), expected, rtol=0, atol=1e-5)


def test_vmap_over_samples_and_over_models(model):
    qparams, qapply, expected = model
    each = jax.vmap(lambda x, factor: qapply(qparams, x[None], factor[None])[0])(X, FACTOR)
    np.testing.assert_allclose(each, expected, rtol=0, atol=1e-5)
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), qparams)
    both = jax.vmap(qapply, (0, None, None))(twice, X, FACTOR)
    np.testing.assert_allclose(both, jnp.stack([expected] * 2), rtol=0, atol=1e-5)


def test_another_batch_size(model):
    qparams, qapply, expected = model
    np.testing.assert_allclose(qapply(qparams, X[:3], FACTOR[:3]), expected[:3], rtol=0, atol=1e-5)


def test_the_gradient_of_what_is_float_is_that_of_the_float_part(model):
    qparams, qapply, _ = model
    gradient = jax.jit(jax.grad(lambda factor: qapply(qparams, X, factor).sum()))(FACTOR)
    ones = jnp.ones_like(FACTOR)
    np.testing.assert_allclose(gradient, qapply(qparams, X, ones), rtol=0, atol=1e-5)


def test_a_branch_that_some_layers_never_take_is_float_in_all():
    def chooses(params, x):
        def layer(x, kernel):
            x = jnp.tanh(x @ kernel)
            return lax.cond(x[0, 0] > 0, lambda x: x @ params["again"], lambda x: x, x), None

        return lax.scan(layer, x, params["kernels"])[0]

    identity = jnp.eye(WIDTH)
    params = {"kernels": jnp.stack([identity, -identity]), "again": identity}
    x = jnp.abs(X)  # the first layer takes the branch, the second does not
    qparams, qapply = jaxquant.quant_post(
        params,
        chooses,
        [x],
        algo="abs_max",
        recover=(),
        allow_batch_dependence=True,
        progress=False,
    )
    rows = networks.rows(qapply)
    assert rows["kernels"]["status"] == "int8"
    assert rows["again"]["status"] == "float"
    assert "the branch not chosen" in rows["again"]["reason"]
    np.testing.assert_allclose(qapply(qparams, x), chooses(params, x), atol=0.02)
