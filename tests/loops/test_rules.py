"""Rules for single layers of a scan."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant import Rule
from jaxquant.graph.model import trace_model
from jaxquant.plan.segments import find_cuts
from tests import networks
from tests.loops import measure

LAYERS = 3
X = jnp.asarray(networks.images(2, (16, 8)))
PARAMS = jax.tree.map(
    jnp.asarray,
    {
        "layers": {
            name: {
                "kernel": networks.images(k, (LAYERS, 8, 8)) / 3,
                "bias": networks.images(k + 5, (LAYERS, 8)) / 3,
            }
            for k, name in enumerate("ab")
        },
        "head": networks.images(4, (8, 4)),
    },
)
# The same arrays as a loop in Python has them.
APART = {
    "head": PARAMS["head"],
    **{
        f"layers_{number}": jax.tree.map(lambda w, n=number: w[n], PARAMS["layers"])
        for number in range(LAYERS)
    },
}


def dense(x, weights):
    return x @ weights["kernel"] + weights["bias"]


def layer(x, weights):
    return jnp.tanh(dense(jax.nn.relu(dense(x, weights["a"])), weights["b"]))


def scanned(p, x):
    return jax.lax.scan(lambda c, w: (layer(c, w), None), x, p["layers"])[0] @ p["head"]


def unrolled(p, x):
    for number in range(LAYERS):
        x = layer(x, p[f"layers_{number}"])
    return x @ p["head"]


@pytest.fixture(scope="module")
def observations():
    return tuple(
        jaxquant.calibrate(params, apply_fn, [X], progress=False)
        for params, apply_fn in ((PARAMS, scanned), (APART, unrolled))
    )


def quantize(observations, **settings):
    return jaxquant.quantize(
        PARAMS,
        scanned,
        observations[0],
        progress=False,
        **{"recover": (), "hist_percent": 0.9, **settings},
    )


@pytest.mark.parametrize(
    ("pattern", "apart", "setting"),
    [
        ("layers/b[1]", ["layers_1/b"], {"algo": "hist"}),
        ("layers/*[-1]", ["layers_2/*"], {"algo": "hist"}),
        ("layers/a[1:]", ["layers_[12]/a"], {"algo": "hist"}),
        ("kind:mul[0]", ["layers_0/*"], {"symmetric": True}),
    ],
)
def test_a_rule_for_a_layer_is_that_of_the_layer_in_the_loop(observations, pattern, apart, setting):
    found, _ = quantize(observations, rules=[Rule(pattern, **setting)])
    wanted, _ = jaxquant.quantize(
        APART, unrolled, observations[1], recover=(), hist_percent=0.9, progress=False,
        rules=[Rule(each, **setting) for each in apart],
    )  # fmt: skip
    flat = measure.flat(found)
    numbers = {path: x for path, x in flat.items() if not path.endswith("/input/zero_point")}
    measure.assert_same_numbers(numbers, measure.stacked(wanted))
    plain = measure.flat(quantize(observations)[0])
    assert any(not np.array_equal(x, plain[path]) for path, x in numbers.items())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers/b[3]", r"matches no site; 'layers/b' has 3 layers"),
        ("layers/b[5:]", r"matches no site; 'layers/b' has 3 layers"),
        ("layers/b[0][1]", "is inside 1 scans over stacked weights"),
        ("head[0]", "'head' is inside no scan over stacked weights, so it has no layers"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(observations, pattern, message):
    with pytest.raises(ValueError, match=message):
        quantize(observations, rules=[Rule(pattern, algo="mse")])
    with pytest.raises(ValueError, match=message):
        quantize(observations, skip=(pattern,))


def test_a_step_of_a_loop_over_constants_has_no_rule_of_its_own():
    params = {"w": APART["layers_0"]["a"]["kernel"], "head": PARAMS["head"]}

    def recurrent(p, x):
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), x) @ p["head"]

    with pytest.raises(ValueError, match="over weights that all steps share"):
        jaxquant.quant_dynamic(params, recurrent, X, skip=("w[1]",))


def quantize_apart(observations, **settings):
    return jaxquant.quantize(
        APART, unrolled, observations[1], progress=False, **{"recover": (), **settings}
    )


FLOAT_LAYERS = {
    "a[1:]": (("layers/a[1:]",), ("layers_[12]/a",)),
    "all of 0": (("layers/*[0]",), ("layers_0/*",)),
    "two patterns": (("layers/a[0]", "layers/b[-1]"), ("layers_0/a", "layers_2/b")),
}


@pytest.mark.parametrize("which", FLOAT_LAYERS)
def test_a_layer_in_float_is_that_of_the_loop(observations, which):
    skip, apart = FLOAT_LAYERS[which]
    qparams, qapply = quantize(observations, skip=skip)
    wanted, expected = quantize_apart(observations, hist_percent=0.9, skip=apart)
    np.testing.assert_array_equal(qapply(qparams, X), expected(wanted, X))
    floats = [row for row in qapply.report().rows if row["status"] == "float"]
    assert {row["reason"] for row in floats} == {f"skip={pattern!r}" for pattern in skip}
    assert len(floats) < len(qapply.report().rows)
    # No weight is there twice: more than in the loop are the zero points of the layers alone.
    found = measure.flat(qparams)
    points = sum(x.nbytes for path, x in found.items() if path.endswith("/zero_point"))
    told, told_apart = (each.report().summary["bytes_after"] for each in (qapply, expected))
    assert told == told_apart + points


def test_segments_are_named_by_their_layers(observations):
    _, qapply = quantize(observations, skip=("layers/b[0]",))
    report = qapply.report()
    assert [row["name"] for row in report.rows] == [
        "layers/a[0]", "layers/b[0]", "layers/a[1:3]", "layers/b[1:3]", "head",
    ]  # fmt: skip
    (row,) = (row for row in report.rows if row["name"] == "layers/a[1:3]")
    assert [layer["name"] for layer in row["by_layer"]] == ["layers/a[1]", "layers/a[2]"]
    _, again = quantize(observations, rules=[Rule("site:layers/a[1:3]", dtype="float")])
    assert [row["name"] for row in again.report().rows if row["status"] == "float"] == [
        "layers/a[1:3]"
    ]


def test_bits_and_recovery_of_single_layers(observations):
    outputs = []
    for params, apply_fn, pattern in (
        (PARAMS, scanned, "layers/*[1]"),
        (APART, unrolled, "layers_1/*"),
    ):
        rules = [Rule(pattern, weight_bits=8)]
        qparams, qapply = jaxquant.quant_weights(
            params, apply_fn, measure.shapes(X), weight_bits=4, group_size=4, rules=rules
        )
        outputs.append(qapply(qparams, X))
    np.testing.assert_array_equal(*outputs)
    step = {"recover": ("bias_correction",)}
    _, qapply = quantize(
        observations, rules=[Rule("layers/a[:2]", **step), Rule("kind:*[2]", **step)]
    )
    recovered = qapply.plan.recovered_by("bias_correction")
    assert recovered == {"layers/a[0:2]", "layers/a[2]", "layers/b[2]"}


def backwards(p, x):
    """The last layer first, its states stacked, a parameter read outside of the loop too."""

    def step(carry, weights):
        return jnp.tanh(layer(carry, weights) @ p["shared"]), carry

    last, states = jax.lax.scan(step, x, p["layers"], reverse=True)
    weighted = (states * jnp.arange(3.0)[:, None, None]).sum(axis=0)
    return last @ p["head"] + weighted[:, :4] + p["layers"]["b"]["bias"].sum()


def backwards_apart(p, x):
    states, layers = {}, [p[f"layers_{number}"] for number in range(LAYERS)]
    for number in (2, 1, 0):
        states[number] = x
        x = jnp.tanh(layer(x, layers[number]) @ p["shared"])
    stacked = jnp.stack([states[number] for number in range(LAYERS)])
    weighted = (stacked * jnp.arange(3.0)[:, None, None]).sum(axis=0)
    biases = jnp.stack([weights["b"]["bias"] for weights in layers])
    return x @ p["head"] + weighted[:, :4] + biases.sum()


def test_a_scan_backwards_with_results_and_shared_weights(tmp_path):
    shared = {"shared": jnp.asarray(networks.images(7, (8, 8)) / 3)}
    params, outputs = {**PARAMS, **shared}, []
    for given, apply_fn, skip in (
        (params, backwards, ("layers/b[1]", "shared[2]")),
        ({**APART, **shared}, backwards_apart, ("layers_1/b", "site:shared")),
    ):
        qparams, qapply = jaxquant.quant_post(
            given, apply_fn, [X], skip=skip, algo="abs_max", progress=False
        )
        outputs.append(qapply(qparams, X))
        if apply_fn is backwards:
            jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    np.testing.assert_array_equal(*outputs)
    stored, loaded = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(loaded(stored, X), outputs[0])
    analysis = jaxquant.analyze(params, backwards, stored, loaded, [X], progress=False)
    # In the order in which they run; every layer is in a scan of its own here.
    kinds = ("layers/a", "layers/b", "shared")
    names = [f"{kind}[{number}]" for number in (2, 1, 0) for kind in kinds]
    assert [row["name"] for row in loaded.report().rows] == [*names, "head"]
    left = {"layers/b[1]", "shared[2]"}
    assert [row["name"] for row in analysis.along] == [
        name for name in (*names, "head") if name not in left
    ]


def nested(p, x):
    def outer(carry, weights):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), carry, weights)[0], None

    return jax.lax.scan(outer, x, p["w"])[0] @ p["head"]


def within_a_loop(p, x):
    def step(_, carry):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), carry, p["w"])[0]

    return jax.lax.fori_loop(0, 2, step, x) @ p["head"]


def computed(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, 2 * p["w"])[0] @ p["head"]


@pytest.mark.parametrize(
    ("apply_fn", "shape", "pattern", "message"),
    [
        (nested, (2, 3, 8, 8), "w[1][0]", "a scan inside a scan, of which the inner one"),
        (within_a_loop, (3, 8, 8), "w[1]", "whose scan runs inside 'scan'"),
        (computed, (3, 8, 8), "w[1]", "whose weights are computed before the scan"),
    ],
)
def test_a_scan_that_cannot_be_cut_says_why(apply_fn, shape, pattern, message):
    params = {"w": jnp.asarray(networks.images(0, shape) / 3), "head": PARAMS["head"]}
    with pytest.raises(ValueError, match=message):
        jaxquant.quant_dynamic(params, apply_fn, measure.shapes(X), skip=(pattern,))


def test_of_nested_scans_the_outer_one_is_cut():
    params = {"w": jnp.asarray(networks.images(0, (3, 2, 8, 8)) / 3), "head": PARAMS["head"]}
    _, qapply = jaxquant.quant_dynamic(params, nested, measure.shapes(X), skip=("w[1]",))
    assert [(row["name"], row["status"]) for row in qapply.report().rows] == [
        ("w[0]", "int8"), ("w[1]", "float"), ("w[2]", "int8"), ("head", "int8"),
    ]  # fmt: skip


def read_twice(p, x):
    x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    return jnp.tanh(x @ p["w"][1]) @ p["h"]


@pytest.fixture(scope="module")
def quantized_twice():
    """(params, quantize with rules) of what reads a weight in the scan and outside of it."""
    params = {"w": networks.images(0, (4, 8, 8)) / 3, "h": networks.images(1, (8, 4))}
    observations = jaxquant.calibrate(params, read_twice, [X], progress=False)
    settings = {"recover": (), "progress": False}
    _, whole = jaxquant.quantize(params, read_twice, observations, **settings)
    assert [row["name"] for row in whole.report().rows] == ["w", "w:1", "h"]
    return params, functools.partial(
        jaxquant.quantize, params, read_twice, observations, **settings
    )


@pytest.mark.parametrize("pattern", ["w[1]", "w[1:]", "w[:2]"])
def test_what_reads_a_cut_weight_outside_of_the_scan_keeps_its_name(quantized_twice, pattern):
    params, quantize = quantized_twice
    qparams, qapply = quantize(rules=[Rule(pattern, dtype="float")])
    status = {row["name"]: row["status"] for row in qapply.report().rows}
    assert len(status) == len(qapply.report().rows)
    assert status["w:1"] == status["h"] == "int8"
    reference = np.asarray(read_twice(params, X))
    noise = np.square(reference - np.asarray(qapply(qparams, X))).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 30


def test_results_of_a_cut_scan_are_put_together_in_float():
    def stacking(p, x):
        ys = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), jax.nn.relu(c @ w)), x, p["w"])[1]
        return jax.nn.relu(ys).reshape(3 * 16, 8)[:16] @ p["h"]

    params = {"w": networks.images(0, (3, 8, 8)) / 3, "h": networks.images(1, (8, 4))}
    settings = {"is_full_quantize": True, "recover": (), "progress": False}
    whole = jaxquant.quant_post(params, stacking, [X], **settings)
    rules = [Rule("w[1]", recover=("bias_correction",))]  # sets nothing, but cuts the scan
    qparams, qapply = jaxquant.quant_post(params, stacking, [X], rules=rules, **settings)
    (row,) = [row for row in qapply.report().rows if row["kind"] == "concat"]
    assert "puts together" in row["reason"]
    np.testing.assert_allclose(qapply(qparams, X), whole[1](whole[0], X), rtol=0, atol=0.05)


def test_layers_for_which_rules_set_the_same_are_cut_apart_no_further():
    model = trace_model(scanned, PARAMS, (X,))
    rules = [Rule(f"site:layers/b[{n}]", dtype="float", reason="the metric") for n in (1, 2)]
    cuts = find_cuts(model, model.sites, rules)
    assert set(cuts.values()) == {(0, 1, LAYERS)}
    rules.append(Rule("site:layers/b[0]", dtype="float", reason="the metric"))
    assert set(find_cuts(model, model.sites, rules).values()) == {(0, LAYERS)}
