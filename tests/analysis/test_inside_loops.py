"""Analysis and accuracy control inside loops: of a scan each layer, of another loop all steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant import stages
from jaxquant.analysis import plots
from jaxquant.graph.model import FloatModel
from jaxquant.progress import Progress
from jaxquant.tune.goal import Goal
from jaxquant.tune.switch import Switch
from tests import networks

LAYERS = 3
X = jnp.asarray(networks.images(2, (16, 8)))


def layer(x, weights):
    x = jax.nn.relu(x @ weights["a"] + weights["bias"]).at[:, 0].set(0.0)
    return jnp.tanh(x @ weights["b"])


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (layer(c, w), None), x, p["layers"])[0] @ p["head"]


def unrolled(p, x):
    for number in range(LAYERS):
        x = layer(x, jax.tree.map(lambda w, n=number: w[n], p["layers"]))
    return x @ p["head"]


def params(spoilt: int | None = None):
    """`spoilt`: of the layer whose `b` has an output channel so large that it loses the others."""
    arrays = {
        "a": networks.images(0, (LAYERS, 8, 8)) / 3,
        "b": networks.images(1, (LAYERS, 8, 8)) / 3,
        "bias": networks.images(3, (LAYERS, 8)) / 3,
    }
    if spoilt is not None:
        arrays["b"] = arrays["b"].at[spoilt, 0].multiply(1e5)
    return jax.tree.map(jnp.asarray, {"layers": arrays, "head": networks.images(4, (8, 4))})


def as_in_the_scan(name):
    """The name in the scan of what is "layers/a:2" or "layers/a:2/input" in the Python loop."""
    if not name.startswith("layers"):
        return name
    site, _, tensor = name.removeprefix("layers/").partition("/")
    site, _, number = site.partition(":")
    return f"layers/{site}{'/' if tensor else ''}{tensor}[{number or 0}]"


def test_each_layer_of_a_scan_is_measured_as_in_the_loop():
    found, expected = (
        jaxquant.analyze(
            params(), apply_fn, *quantized, [X, 2 * X], progress=False
        )
        for apply_fn in (scanned, unrolled)
        for quantized in [jaxquant.quant_post(params(), apply_fn, [X], progress=False)]
    )  # fmt: skip
    rows, wanted = found.along, expected.along
    assert [row["name"] for row in rows] == [as_in_the_scan(row["name"]) for row in wanted]
    for row, want in zip(rows, wanted, strict=True):
        for key, value in row.items():
            if isinstance(value, float):
                np.testing.assert_allclose(value, want[key], rtol=1e-3, err_msg=f"{row} {key}")
            elif isinstance(value, int) and key != "rank":
                assert value == want[key], key
        assert row["input"] == as_in_the_scan(want["input"])
    assert set(found.tensors) == {as_in_the_scan(name) for name in expected.tensors}
    assert set(found.weights) == {as_in_the_scan(name) for name in expected.weights}
    for name, tensor in expected.tensors.items():
        np.testing.assert_array_equal(
            found.tensors[as_in_the_scan(name)].stats.counts, tensor.stats.counts
        )
    for row in found.rows:
        worst = row["worst_layer"] or row["name"]
        layers = row["by_layer"] or [row]
        assert worst == min(layers, key=lambda each: each["own_db"])["name"]
        assert worst in str(found)
    plots.sqnr(found)


def recurrent(p, x):
    """A `while` loop with a choice in it, the first branch of which is never taken."""

    def step(carry):
        number, state = carry
        state = jax.lax.cond(
            number < 0, lambda s: s @ p["never"], lambda s: jnp.tanh(s @ p["step"] + x), state
        )
        return number + 1, state

    state = jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, jnp.zeros((16, 8))))[1]
    return state @ p["head"]


@pytest.fixture(scope="module")
def quantized_loop():
    weights = {name: networks.images(k, (8, 8)) / 3 for k, name in enumerate(("never", "step"))}
    arrays = jax.tree.map(jnp.asarray, {**weights, "head": networks.images(4, (8, 4))})
    return arrays, jaxquant.quant_post(arrays, recurrent, [X], progress=False)


def test_a_loop_over_constants_is_measured_over_all_its_steps(quantized_loop):
    arrays, (qparams, qapply) = quantized_loop
    found = jaxquant.analyze(arrays, recurrent, qparams, qapply, [X], progress=False)
    assert [row["name"] for row in found.rows] == ["step", "head"]
    told = {row["name"]: row for row in qapply.report().rows}
    for row in found.rows:
        assert row["by_layer"] is None
        assert abs(row["own_sqnr_db"] - told[row["name"]]["own_sqnr_db"]) < 0.1
        assert abs(row["accumulated_sqnr_db"] - told[row["name"]]["sqnr_db"]) < 0.1
    states = X.size * 3
    assert sum(found.tensors["step/input"].stats.counts) == states


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_a_mixture_of_one_kind_is_that_model_inside_loops_too(loop, quantized_loop):
    if loop == "scan":
        arrays, apply_fn = params(), scanned
        qparams, qapply = jaxquant.quant_post(arrays, apply_fn, [X], progress=False)
    else:
        arrays, (qparams, qapply) = quantized_loop
        apply_fn = recurrent
    switch = Switch(FloatModel(apply_fn, arrays), qparams, qapply.plan, [(X,)])
    inside = "layers/b" if loop == "scan" else "step"
    assert inside in switch.names
    want = qapply.with_backend("xla")(qparams, X)
    np.testing.assert_allclose(switch.model(switch.names)(X), want, atol=1e-5)
    np.testing.assert_allclose(switch.model([])(X), apply_fn(arrays, X), atol=1e-5)
    assert np.abs(switch.model([inside])(X) - apply_fn(arrays, X)).max() > 1e-5


def test_accuracy_control_leaves_a_layer_of_a_scan_in_float_as_it_does_in_a_loop_in_python():
    arrays = params(spoilt=1)
    told = []

    def metric(model):
        return -float(jnp.abs(model(X) - scanned(arrays, X)).mean())

    for function, name in ((scanned, str), (unrolled, as_in_the_scan)):
        config = jaxquant.QuantConfig(recover=())
        observations = jaxquant.calibrate(arrays, function, [X], progress=False, config=config)
        source, goal = (
            stages.float_model(arrays, function),
            Goal(metric, 0.1, algos=(), recovery=()),
        )
        qparams, qapply = stages.quantize(
            source, observations, config, None, Progress("quantize", shown=False), goal
        )
        control = qapply.report().summary["control"]
        assert control["held"]
        assert metric(functools.partial(qapply, qparams)) == control["score"]
        floats = [row["name"] for row in qapply.report().rows if row["status"] == "float"]
        tried = [[name(site) for site in step["sites"]] for step in control["steps"]]
        told.append((list(map(name, floats)), name(control["ranking"][0]), tried))
    assert told[0][:2] == (["layers/b[1]"], "layers/b[1]")
    assert told[0] == told[1]


def test_a_poor_model_is_told_the_layer_where_it_falls():
    falls = r"falls most at layers/b\[1\] \(from [34]\d.\d to -?\d.\d dB.*skip=\('layers/b\[1\]',\)"
    with pytest.warns(UserWarning, match=falls):
        jaxquant.quant_post(params(spoilt=1), scanned, [X], recover=(), progress=False)
