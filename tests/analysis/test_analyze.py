"""Analysis: planted faults come first, the numbers are those of NumPy, scores are resumable."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.analysis import measures
from jaxquant.graph.model import FloatModel, trace_model
from jaxquant.plan.bind import bind
from jaxquant.run.program import Program
from jaxquant.tune.biases import without_correction
from jaxquant.tune.parts import find_parts
from jaxquant.tune.switch import Switch
from tests import networks
from tests.analysis import faults
from tests.loops import measure

FAULTS = (faults.outlier_input_channel, faults.outlier_output_channel, faults.rare_spike)


@functools.cache
def quantized(plant):
    """(fault, qparams, qapply) of a planted fault."""
    fault = plant()
    return fault, *quantize(fault)


@functools.cache
def scored(plant):
    fault, qparams, qapply = quantized(plant)
    return analyze(fault, qparams, qapply, metric=accuracy(fault))


def quantize(fault, **options):
    """What repairs a planted fault unasked ("outliers") is left out."""
    return jaxquant.quant_post(
        fault.params,
        faults.apply_fn,
        fault.images,
        batch_size=256,
        progress=False,
        **{"recover": ("bias_correction",), **fault.options, **options},
    )


def accuracy(fault):
    return lambda model: np.mean(np.asarray(model(fault.images)).argmax(-1) == fault.labels)


def analyze(fault, qparams, qapply, **options):
    return jaxquant.analyze(
        fault.params,
        faults.apply_fn,
        qparams,
        qapply,
        fault.images,
        batch_size=256,
        progress=False,
        **options,
    )


@pytest.mark.filterwarnings("ignore:the quantized model's outputs")
@pytest.mark.parametrize("plant", FAULTS)
def test_a_planted_fault_is_ranked_first(plant):
    fault, analysis = quantized(plant)[0], scored(plant)
    assert analysis.ranking[0] == fault.site
    worst, second = analysis.worst[:2]
    assert worst["effect"] > 5 * max(second["effect"], 0.01)
    assert worst["cause"] in ("weights", "outliers")
    assert any(line.startswith(f"{fault.site}: ") for line in analysis.advice())
    by_error = sorted(analysis.rows, key=lambda row: row["own_db"])  # the ranking without a metric
    assert by_error[0]["name"] == fault.site


def test_a_healthy_model_has_nothing_to_complain_of():
    analysis = analyze(*quantized(faults.healthy))
    assert not analysis.has_scores
    assert analysis.ranking == sorted(
        faults.LAYERS, key=lambda n: next(r["own_db"] for r in analysis.rows if r["name"] == n)
    )
    assert analysis.advice() == []
    assert all(row["own_db"] > 30 and row["lost_channels"] == 0 for row in analysis.rows)
    assert "No site stands out" in str(analysis)


def test_the_errors_are_those_of_numpy():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    x = rng.normal(size=(32, 6)).astype(np.float32)

    def apply_fn(params, x):
        return x @ params["w"]

    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=(), progress=False)
    y, got = np.float64(apply_fn(params, x)), np.float64(qapply(qparams, x))
    analysis = jaxquant.analyze(params, apply_fn, qparams, qapply, [x[:20], x[20:]], progress=False)
    (row,) = analysis.rows
    sqnr = 10 * np.log10((y**2).sum() / ((y - got) ** 2).sum())
    samples = 10 * np.log10((y**2).sum(1) / ((y - got) ** 2).sum(1))
    cosine = (y * got).sum() / np.sqrt((y**2).sum() * (got**2).sum())
    assert row["own_sqnr_db"] == pytest.approx(sqnr, abs=0.01)
    assert row["accumulated_sqnr_db"] == pytest.approx(sqnr, abs=0.01)
    assert row["own_db"] == pytest.approx(samples.mean(), abs=0.01)
    assert row["own_cosine"] == pytest.approx(cosine, abs=1e-6)
    assert analysis.summary["batches"] == 2
    tensor = analysis.tensors["w/input"]
    assert tensor.low.tolist() == [x[:20].min(), x[20:].min()]
    assert tensor.high.tolist() == [x[:20].max(), x[20:].max()]
    assert row["low"] == x.min()
    assert row["high_spread"] == pytest.approx(abs(x[:20].max() - x[20:].max()))
    assert tensor.stats.count == x.size
    np.testing.assert_allclose(analysis.weights["w"], np.abs(params["w"]).max(0), rtol=1e-6)


def test_clipped_values_and_dead_channels_are_counted():
    params = {"w": jnp.eye(8).at[3].set(0.0).at[:, 3].set(0.0)}
    x = np.abs(np.random.default_rng(0).normal(size=(64, 8))).astype(np.float32)
    half = jaxquant.histogram_observer(lambda stats, levels: [s.abs_max / 2 for s in stats])
    qparams, qapply = jaxquant.quant_post(
        params, lambda p, x: x @ p["w"], [x], algo=half, recover=(), progress=False
    )
    analysis = jaxquant.analyze(
        params, lambda p, x: x @ p["w"], qparams, qapply, [x], progress=False
    )
    (row,) = analysis.rows
    step = qapply.plan.tensors[0].scale
    assert row["clipped"] == np.mean(np.rint(x / step) > 255)
    assert row["clipped"] > 0
    assert row["clipped_noise"] > 0.9
    assert (row["channels"], row["dead_channels"], row["lost_channels"]) == (8, 1, 0)


@pytest.mark.parametrize("full", [False, True])
def test_a_mixture_of_one_kind_is_that_model(full):
    params = networks.plain_params()
    x = jnp.asarray(np.random.default_rng(1).normal(size=networks.IMAGE), jnp.float32)
    qparams, qapply = jaxquant.quant_post(
        params, networks.plain_net, [x], is_full_quantize=full, progress=False
    )
    switch = Switch(FloatModel(networks.plain_net, params), qparams, qapply.plan, [(x,)])
    want = qapply.with_backend("xla")(qparams, x)
    np.testing.assert_allclose(switch.model(switch.names)(x), want, atol=1e-5)
    np.testing.assert_allclose(switch.model([])(x), networks.plain_net(params, x), atol=1e-5)
    one = switch.model(switch.names[:1])(x)
    assert np.abs(one - want).max() > 1e-5
    with pytest.raises(ValueError, match="no int8 site is named nothing"):
        switch.model(["nothing"])


def test_units_of_a_full_quantization_have_softmax_and_pooling():
    params = {"w": jnp.eye(8)}

    def apply_fn(params, x):
        return jax.nn.softmax(x @ params["w"]).reshape(2, 2, 2, 8).mean((1, 2))

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [x], is_full_quantize=True, progress=False
    )
    program = Program(bind(trace_model(apply_fn, params, (x,)), qapply.plan), params)
    assert {part.kind for part in find_parts(program).own} >= {"mul", "softmax", "pool2d"}
    analysis = jaxquant.analyze(params, apply_fn, qparams, qapply, [x], progress=False)
    assert {row["kind"] for row in analysis.rows} == {"mul", "softmax", "pool2d"}


def test_biases_without_correction_are_those_of_no_recovery():
    fault = faults.healthy()
    plain, corrected = (
        jaxquant.quant_post(
            fault.params, faults.apply_fn, [fault.images], recover=recover, progress=False
        )
        for recover in ((), ("bias_correction",))
    )
    model = trace_model(faults.apply_fn, fault.params, (fault.images,))
    program = Program(bind(model, corrected[1].plan), fault.params)
    found = without_correction(program, fault.params, corrected[0])["sites"]
    for name, arrays in plain[0]["sites"].items():
        for key, array in arrays.items():
            np.testing.assert_allclose(found[name][key], array, rtol=1e-6, atol=1e-7)
        unit = np.float64(corrected[0]["sites"][name]["multiplier"])
        moved = corrected[0]["sites"][name]["bias"] - arrays["bias"]
        assert np.abs(moved).max() > 0.5 * unit.min()
        steps = np.float64(found[name]["bias"]) / unit
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6 * np.abs(steps).max())


@pytest.mark.parametrize("quantize", [jaxquant.quant_dynamic, jaxquant.quant_weights])
def test_models_without_calibration_are_analyzed_too(quantize):
    fault = faults.healthy()
    qparams, qapply = quantize(fault.params, faults.apply_fn, fault.images[:4])
    analysis = analyze(fault, qparams, qapply, metric=accuracy(fault))
    assert sorted(analysis.ranking) == list(faults.LAYERS)
    assert analysis.rows[0]["clipped"] is None
    assert analysis.summary["float_score"] == 1.0


def test_a_product_that_nobody_reads_is_not_analyzed():
    """The energy, where a model gives the force alone: its derivative needs the parts before it."""
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8)), "v": jnp.ones((8, 1))}

    def force(p, x):
        return -jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(x)

    x = jax.random.normal(jax.random.key(1), (4, 8))

    def metric(model):
        return -float(jnp.square(model(x) - force(params, x)).mean())

    for quantize in (jaxquant.quant_post, jaxquant.quant_dynamic):
        qparams, qapply = quantize(params, force, [x], progress=False)
        found = jaxquant.analyze(params, force, qparams, qapply, [x], metric, progress=False)
        assert {row["name"] for row in found.rows} == {"w", "w:1"}


def test_scores_are_kept_in_a_file_and_go_on_after_an_interruption(tmp_path):
    fault, qparams, qapply = quantized(faults.healthy)
    path = tmp_path / "scores.json"
    calls = []

    def metric(model, fail_at=math.inf):
        calls.append(1)
        if len(calls) > fail_at:
            raise KeyboardInterrupt
        return accuracy(fault)(model)

    with pytest.raises(KeyboardInterrupt):
        analyze(fault, qparams, qapply, metric=lambda m: metric(m, 6), file=path)
    assert len(json.loads(path.read_text())["scores"]) == 6
    calls.clear()
    resumed = analyze(fault, qparams, qapply, metric=metric, file=path)
    taken = len(calls)
    whole = scored(faults.healthy)
    assert taken == len(json.loads(path.read_text())["scores"]) - 6 + 1  # checks the metric
    assert [dict(row) for row in resumed.rows] == [dict(row) for row in whole.rows]
    with pytest.raises(jaxquant.FileError, match="another metric"):
        analyze(fault, qparams, qapply, metric=lambda model: 0.5, file=path)
    with pytest.raises(jaxquant.FileError, match="another model"):
        analyze(*quantized(faults.outlier_input_channel), metric=metric, file=path)
    path.write_text("{}")
    with pytest.raises(jaxquant.FileError, match="damaged"):
        analyze(fault, qparams, qapply, metric=metric, file=path)


def test_bad_input_is_refused():
    fault, qparams, qapply = quantized(faults.healthy)
    with pytest.raises(TypeError, match="one number"):
        analyze(fault, qparams, qapply, metric=lambda model: model(fault.images))
    with pytest.raises(ValueError, match="has to be finite"):
        analyze(fault, qparams, qapply, metric=lambda model: float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinity in batch 1"):
        jaxquant.analyze(
            fault.params,
            faults.apply_fn,
            qparams,
            qapply,
            [fault.images[:8], np.full((8, 16), np.inf, np.float32)],
            progress=False,
        )
    with pytest.raises(ValueError, match="qparams"):
        analyze(fault, fault.params, qapply)


def test_an_ordinary_sample_counts_as_much_as_one_of_large_values():
    y = np.ones((10, 4), np.float32)
    y[0] = 1e4
    other = y.copy()
    other[1:] = 0
    found = measures.Moments(*(np.float64(x) for x in measures.moments(jnp.asarray(y), other)))
    assert found.sqnr_db > 60
    assert found.sample_db == pytest.approx((100 + 9 * 0) / 10, abs=1e-4)
    lost = measures.moments(jnp.ones((2, 2)), jnp.full((2, 2), jnp.nan))
    assert float(lost.noise) == math.inf
    assert float(lost.decibels) == -40


def test_an_analysis_is_plain_data():
    analysis = scored(faults.healthy)
    data = json.loads(analysis.to_json())
    assert len(data["rows"]) == 5
    assert data["summary"]["curve"][0][:2] == [0, 1.0]
    assert data["summary"]["curve"][-1][2] == 1.0
    html = analysis._repr_html_()
    assert html.count("<tr") == 6
    assert "left float" in html


def test_a_softmax_behind_a_bias():
    """The bias is of the dot that absorbs it, and no mask of the softmax."""
    p = {
        "w": jax.random.normal(jax.random.key(0), (8, 5)),
        "b": jax.random.normal(jax.random.key(1), (5,)),
    }

    def apply_fn(p, x):
        return jax.nn.softmax(x @ p["w"] + p["b"])

    x = jax.random.normal(jax.random.key(2), (16, 8))
    qparams, qapply = jaxquant.quant_post(p, apply_fn, [x], is_full_quantize=True, progress=False)
    analysis = jaxquant.analyze(p, apply_fn, qparams, qapply, [x], progress=False)
    assert {"w", "softmax"} <= {row["name"] for row in analysis.rows}


@pytest.mark.parametrize("recover", [(), ("gptq",), ("awq", "gptq")])
def test_parameters_that_were_changed_are_analyzed_as_they_are(recover):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(256, 4)) @ draw.normal(size=(4, 16)) + 9 * draw.normal(size=16)
    x = x.astype(np.float32)
    params = {"w": draw.normal(size=(16, 8)).astype(np.float32), "b": np.ones(8, np.float32)}
    params["g"] = np.ones(16, np.float32)

    def apply_fn(p, x):
        return (jax.nn.standardize(x) * p["g"]) @ p["w"] + p["b"]

    options = {"weight_bits": 4, "rules": [jaxquant.Rule("*", weight_bits=4)], "recover": recover}
    qparams, qapply = jaxquant.quant_weights(params, apply_fn, x, progress=False, **options)
    found = jaxquant.analyze(params, apply_fn, qparams, qapply, x, progress=False)
    want = measure.sqnr(apply_fn(params, x), qapply(qparams, x))
    assert found.summary["output_sqnr_db"] == pytest.approx(want, abs=0.1)


@pytest.mark.parametrize("is_scanned", [False, True])
def test_a_metric_sees_each_site_with_its_own_bias(is_scanned):
    draw = np.random.default_rng(0)
    x = (draw.normal(size=(256, 16)) + 3).astype(np.float32)  # a mean, which rounding puts off
    layers = (2,) if is_scanned else ()
    params = {"w": draw.normal(size=(*layers, 16, 16)), "b": np.ones((*layers, 16))}
    params = {name: array.astype(np.float32) for name, array in params.items()}

    def apply_fn(p, x):
        if is_scanned:
            layer = lambda x, own: (x @ own["w"] / 4 + own["b"], None)  # noqa: E731
            return jax.lax.scan(layer, x, p)[0]
        return x @ p["w"] + p["b"]

    rules = [jaxquant.Rule("*", weight_bits=4)]
    qparams, qapply = jaxquant.quant_weights(
        params, apply_fn, x, weight_bits=4, group_size=8, rules=rules, progress=False
    )
    want = np.asarray(apply_fn(params, x))

    def closeness(model):
        return min(measure.sqnr(want, np.asarray(model(x))), 200.0)  # a metric is finite

    found = jaxquant.analyze(params, apply_fn, qparams, qapply, x, closeness, progress=False)
    ours = measure.sqnr(want, qapply(qparams, x))
    (row,) = found.rows
    # Its one site alone in int8 is the whole int8 model; alone in float it is the float model.
    assert row["alone_score"] == pytest.approx(ours, abs=0.1)
    assert row["float_score"] > 100
