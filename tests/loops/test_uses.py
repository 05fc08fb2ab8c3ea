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


@pytest.mark.parametrize("recover", [(), ("equalization", "bias_correction")])
def test_a_branch_that_some_layers_never_take_has_what_the_others_saw(recover):
    def chooses(params, x):
        def layer(x, kernel):
            x = jnp.tanh(x @ kernel)
            return lax.cond(x[0, 0] > 0, lambda x: x @ params["again"], lambda x: x, x), None

        return lax.scan(layer, x, params["kernels"])[0]

    identity = jnp.eye(WIDTH)
    params = {"kernels": jnp.stack([identity, -identity]), "again": identity}
    x = X.at[0, 0].set(1)  # the first layer takes the branch, the second does not
    qparams, qapply = jaxquant.quant_post(
        params,
        chooses,
        [x],
        algo="abs_max",
        recover=recover,
        activation_quantize_type="symmetric",
        allow_batch_dependence=True,
        progress=False,
    )
    rows = networks.rows(qapply)
    assert [rows[name]["status"] for name in ("kernels", "again")] == ["int8", "int8"]
    scales = qparams["tensors"]["again/input"]["scale"]
    assert scales[0] == scales[1]
    for inputs in (x, -x):
        np.testing.assert_allclose(qapply(qparams, inputs), chooses(params, inputs), atol=0.02)


def test_a_branch_that_nothing_took_is_float_and_the_report_says_so(tmp_path):
    def chooses(params, x):
        return lax.cond(
            x[0, 0] > 9, lambda x: x @ params["again"], lambda x: x, x @ params["again"]
        )

    observations = jaxquant.calibrate(
        PARAMS, chooses, [X], allow_batch_dependence=True, progress=False
    )
    jaxquant.save_observations(tmp_path / "observations", observations)
    loaded = jaxquant.load_observations(tmp_path / "observations")
    _, qapply = jaxquant.quantize(PARAMS, chooses, loaded, recover=(), progress=False)
    rows = networks.rows(qapply)
    assert rows["again"]["status"] == "int8"
    assert rows["again:1"]["reason"] == "no calibration batch chose its branch"


def test_what_is_empty_whatever_the_batch_stays_float():
    """An associative scan reads an empty slice where its length is 4."""

    def apply_fn(params, x):
        return lax.associative_scan(lambda a, b: jnp.tanh(a @ params["again"]) + b, x, axis=0)

    qparams, qapply = jaxquant.quant_post(
        PARAMS,
        apply_fn,
        [X],
        algo="abs_max",
        recover=(),
        allow_batch_dependence=True,
        progress=False,
    )
    reasons = [row["reason"] for row in qapply.report().rows if row["status"] == "float"]
    assert [reason.partition(";")[0] for reason in reasons] == [
        "its input was empty in every calibration batch"
    ]
    np.testing.assert_allclose(qapply(qparams, X), apply_fn(PARAMS, X), atol=0.05)


def test_the_test_of_a_loop_is_in_its_body():
    def halving(params, x, loop):
        return loop(
            lambda x: jnp.abs(x @ params["again"]).max() > 0.1,
            lambda x: x / 2,
            x,
        )

    def in_python(test, step, x):
        while test(x):
            x = step(x)
        return x

    qparams, qapply = networks.quantize(
        PARAMS, lambda params, x: halving(params, x, lax.while_loop), X
    )
    assert [(site.name, site.status) for site in qapply.plan.sites] == [
        ("again", "int8"),
        ("again:1", "int8"),
    ]
    assert qparams["params"]["again"].keys() == {"int8", "scale"}
    wanted = halving(PARAMS, X, in_python)
    assert jnp.abs(wanted).max() < jnp.abs(X).max()
    np.testing.assert_allclose(qapply(qparams, X), wanted, atol=0.02)


@pytest.mark.parametrize("tests_a_product", [True, False])
def test_a_batch_of_loops_does_what_each_does_alone(tests_a_product, tmp_path):
    """`jax.vmap` of a `while`: samples end after unlike numbers of steps."""

    def each(params, x):
        def goes_on(carry):
            steps, y = carry
            size = jnp.abs(y @ params["again"] if tests_a_product else y).max()
            return (size > 0.5) & (steps < 6)

        return lax.while_loop(
            goes_on, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["again"]) / 2), (0, x)
        )[1]

    def apply_fn(params, x):
        return jax.vmap(each, (None, 0))(params, x)

    x = X * jnp.linspace(0.1, 2, len(X))[:, None]
    qparams, qapply = networks.quantize(PARAMS, apply_fn, x)
    assert {site.status for site in qapply.plan.sites} == {"int8"}
    assert len(qapply.plan.sites) == (3 if tests_a_product else 1)
    together = np.asarray(qapply(qparams, x))
    alone = np.concatenate([qapply(qparams, x[n : n + 1]) for n in range(len(x))])
    np.testing.assert_array_equal(together, alone)
    assert np.abs(together - apply_fn(PARAMS, x)).max() < 0.1
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(apply_loaded(loaded, x), together)


def test_a_scan_without_steps_is_never_run():
    def apply_fn(params, x):
        x = lax.scan(lambda x, w: (x @ w, None), x, params["layers"]["kernel"][:0])[0]
        return x @ params["again"]

    _, qapply = jaxquant.quant_dynamic(PARAMS, apply_fn, measure.shapes(X), progress=False)
    assert [row["reason"] for row in qapply.report().rows] == [
        "inside a scan of length 0, of which no step runs",
        "",
    ]
