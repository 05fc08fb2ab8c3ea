"""Rules for single layers of a scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant import Rule
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


@pytest.mark.parametrize("settings", [
    {"skip": ("layers/b[1]",)},
    {"rules": [Rule("layers/*[0:2]", recover=("bias_correction",))]},
])  # fmt: skip
def test_what_layers_share_is_not_set_for_one(observations, settings):
    with pytest.raises(ValueError, match=r"for some layers of 'layers/[ab]' alone"):
        quantize(observations, **settings)
    everywhere = {"skip": ("layers/b[0:3]",)}
    _, qapply = quantize(observations, **everywhere)
    assert [row["name"] for row in qapply.report().rows if row["status"] == "float"] == ["layers/b"]
