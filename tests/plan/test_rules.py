"""Rules: what is set for some sites, what wins, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant import QuantConfig, Rule
from tests import networks

PARAMS = {
    "body": {"w": networks.images(0, (16, 12)) / 4},
    "neck": {"w": networks.images(1, (12, 12)) / 4},
    "head": {"w": networks.images(2, (12, 5)) / 4},
}
X = networks.images(3, (32, 16)) ** 3  # heavy tails: no two algos agree


def net(p, x):
    x = jax.nn.relu(x @ p["body"]["w"])
    x = jax.nn.softmax(x @ p["neck"]["w"]) * 3
    return x @ p["head"]["w"]


@pytest.fixture(scope="module")
def observations():
    return jaxquant.calibrate(PARAMS, net, [X], progress=False)


def quantize(observations, **settings):
    qparams, qapply = jaxquant.quantize(
        PARAMS, net, observations, progress=False, **{"recover": (), **settings}
    )
    return qparams, qapply.plan


def thresholds(plan):
    return {t.name.partition("/")[0]: t.threshold for t in plan.tensors}


def statuses(plan):
    return {site.name: site.status for site in plan.sites}


def test_each_tensor_is_searched_by_the_algo_of_its_site(observations):
    alone = {
        algo: thresholds(quantize(observations, algo=algo, hist_percent=0.99)[1])
        for algo in ("hist", "emd", "abs_max")
    }
    rules = [Rule("body", algo="hist"), Rule("head", algo="mse"), Rule("h*", algo="abs_max")]
    _, plan = quantize(observations, algo="emd", hist_percent=0.99, rules=rules)
    assert thresholds(plan) == {
        "body": alone["hist"]["body"],
        "neck": alone["emd"]["neck"],
        "head": alone["abs_max"]["head"],
    }
    for name in alone["emd"]:
        assert len({alone[algo][name] for algo in alone}) == 3, "or this shows nothing"


def test_the_last_rule_that_sets_a_thing_wins(observations):
    rules = [
        Rule("*", dtype="float"),
        Rule("kind:mul", dtype="int8", symmetric=True),
        Rule("neck", symmetric=False),
        Rule("head", dtype="float", reason="as it was before"),
    ]
    _, plan = quantize(observations, skip=("body",), rules=rules)
    assert statuses(plan) == {"body": "int8", "neck": "int8", "head": "float"}
    assert next(s.reason for s in plan.sites if s.name == "head") == "as it was before"
    zero_points = {t.name.partition("/")[0]: t.zero_point for t in plan.tensors}
    assert zero_points["neck"] == -128, "behind a relu, and not symmetric"


def test_symmetric_is_set_by_site(observations):
    _, plan = quantize(observations, rules=[Rule("neck", symmetric=True)])
    zero_points = {t.name.partition("/")[0]: t.zero_point for t in plan.tensors}
    assert zero_points["neck"] == 0
    assert zero_points["head"] == -128, "behind a softmax"


def test_skip_is_a_rule(observations):
    skipped, plan = quantize(observations, skip=("head",))
    ruled, other = quantize(observations, rules=[Rule("head", dtype="float", reason="skip='head'")])
    assert plan == other
    jax.tree.map(np.testing.assert_array_equal, skipped, ruled)


def test_sites_that_read_one_tensor_share_what_the_last_rule_says():
    def forked(p, x):
        return x @ p["a"], x @ p["b"]

    params = {"a": PARAMS["body"]["w"], "b": PARAMS["body"]["w"] * 2}
    seen = jaxquant.calibrate(params, forked, [X], progress=False)

    def threshold(*rules):
        _, qapply = jaxquant.quantize(params, forked, seen, rules=rules, progress=False)
        (tensor,) = qapply.plan.tensors
        return tensor.threshold

    first, second = Rule("a", algo="hist"), Rule("b", algo="emd")
    assert threshold(second, first) == threshold(Rule("*", algo="hist"))
    assert threshold(first, second) == threshold(Rule("*", algo="emd"))
    assert threshold(first, second) != threshold(second, first)


def test_recovery_is_of_the_sites_that_have_it(observations):
    plain = jax.device_get(quantize(observations)[0]["sites"])
    rules = [Rule("neck", recover=("bias_correction",))]
    ruled = jax.device_get(quantize(observations, rules=rules)[0]["sites"])
    assert np.any(ruled["neck"]["bias"] != plain["neck"].get("bias", 0))
    for name in ("body", "head"):
        np.testing.assert_array_equal(ruled[name]["multiplier"], plain[name]["multiplier"])
        np.testing.assert_array_equal(ruled[name].get("bias", 0), plain[name].get("bias", 0))
    everywhere = jax.device_get(quantize(observations, recover=("bias_correction",))[0]["sites"])
    without = [Rule("head", recover=())]
    left = jax.device_get(
        quantize(observations, recover=("bias_correction",), rules=without)[0]["sites"]
    )
    np.testing.assert_array_equal(left["body"]["bias"], everywhere["body"]["bias"])
    np.testing.assert_array_equal(left["head"].get("bias", 0), plain["head"].get("bias", 0))


def test_equalization_divides_the_tensors_of_its_sites_alone():
    ranges = jnp.logspace(-2, 0, 16)
    params = {"a": PARAMS["body"]["w"] / ranges[:, None], "b": PARAMS["body"]["w"][:12, :5]}

    def two(p, x):
        return jax.nn.gelu((x * ranges) @ p["a"]) @ p["b"]

    seen = jaxquant.calibrate(params, two, [np.clip(X, -1, 1)], progress=False)

    def divided(**settings):
        _, qapply = jaxquant.quantize(params, two, seen, progress=False, **settings)
        return {t.name for t in qapply.plan.tensors if t.channels}

    assert "a/input" in divided(recover=("equalization",))
    assert divided(recover=(), rules=[Rule("a", recover=("equalization",))]) == {"a/input"}
    assert "a/input" not in divided(
        recover=("equalization",), rules=[Rule("a", recover=("bias_correction",))]
    )


def test_weights_have_bits_of_their_own():
    rules = [Rule("head", weight_bits=8), Rule("body", dtype="float")]
    qparams, qapply = jaxquant.quant_weights(
        PARAMS, net, X, weight_bits=4, rules=rules, progress=False
    )
    stored = {name: set(weight["w"]) if isinstance(weight["w"], dict) else "float"
              for name, weight in qparams["params"].items()}  # fmt: skip
    assert stored == {"body": "float", "neck": {"int4", "scale"}, "head": {"int8", "scale"}}
    assert {row["name"]: row["mode"] for row in qapply.report().rows} == {
        "body": "float", "neck": "int4 weights", "head": "int8 weights"
    }  # fmt: skip
    expected = net({name: {"w": restored(p["w"])} for name, p in qparams["params"].items()}, X)
    np.testing.assert_allclose(qapply(qparams, X), expected, rtol=1e-4, atol=1e-4)


def restored(weight):
    if not isinstance(weight, dict):
        return weight
    if "int8" in weight:
        return weight["int8"].astype(jnp.float32) * weight["scale"]
    packed = np.asarray(weight["int4"], np.int64)
    pairs = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, packed.shape[1])
    return jnp.float32((pairs + 8) % 16 - 8) * weight["scale"]


def test_a_weight_in_two_widths_is_stored_in_both():
    def tied(p, i):
        return jnp.take(p["table"], i, axis=0) @ p["table"].T

    params, ids = {"table": PARAMS["body"]["w"]}, jnp.arange(4)
    qparams, qapply = jaxquant.quant_weights(
        params, tied, ids, weight_bits=4, rules=[Rule("kind:mul", weight_bits=8)], progress=False
    )
    assert {"int4", "int8"} == {name[:4] for name in qparams["params"]["table"] if "int" in name}
    assert qapply(qparams, ids).shape == (4, 16)


@pytest.mark.parametrize(
    ("rule", "match"),
    [
        (lambda: Rule("hed", dtype="float"), "rule 'hed' matches no site; nearest: head"),
        (
            lambda: Rule("kind:conv", algo="KL"),
            "rule 'kind:conv' matches no site; nearest: kind:mul",
        ),
        (lambda: Rule("site:hea", dtype="float"), "nearest: site:head"),
        (lambda: Rule("kind:softmax", dtype="int8"), "softmax, none of which is in quantizable"),
        (lambda: Rule("kind:softmax", recover=()), None),
        (lambda: Rule("kind:softmax", recover=("adaround",)), "sets recover, which is of sites"),
        (lambda: Rule("head", weight_bits=4), "weight_bits=4 is of jaxquant.quant_weights"),
        (lambda: Rule("head"), "sets nothing: give dtype, algo"),
        (lambda: Rule("", dtype="float"), "holds glob patterns on site names, .*got ''"),
        (lambda: Rule("head", dtype="int4"), "dtype: 'int4' is not known; nearest: int8"),
        (lambda: Rule("head", algo="kl"), "algo: 'kl' is not known; nearest: KL"),
        (lambda: Rule("head", recover="adaround"), "recover is a sequence of names"),
        (lambda: Rule("head", recover=("ada",)), "recover: 'ada' is not known"),
        (lambda: Rule("head", symmetric=1), "symmetric is True or False, got 1"),
        (lambda: Rule("head", weight_bits=3), "weight_bits is 8 or 4, got 3"),
        (lambda: {"pattern": "head"}, r"rules holds jaxquant.Rule\(pattern, ...\), got"),
    ],
)
def test_what_a_rule_cannot_set_is_refused(observations, rule, match):
    if match is None:
        quantize(observations, rules=[rule()])
        return
    with pytest.raises(ValueError, match=match):
        quantize(observations, rules=[rule()])


def test_other_modes_refuse_what_they_do_not_have():
    for setting in ({"algo": "mse"}, {"symmetric": True}, {"recover": ()}):
        with pytest.raises(ValueError, match=r"which is of jaxquant\.quant_post"):
            jaxquant.quant_dynamic(PARAMS, net, X, rules=[Rule("head", **setting)], progress=False)


def test_one_observer_with_statistics_of_its_own_may_be_named():
    own = jaxquant.Observer(
        init=lambda: jnp.zeros(()),
        update=lambda state, x: jnp.maximum(state, abs(x).max()),
        threshold=lambda states, levels: states,
    )
    with pytest.raises(ValueError, match="several observers that keep statistics of their own"):
        QuantConfig(algo="avg", rules=[Rule("head", algo=own)])
    _, qapply = jaxquant.quant_post(PARAMS, net, [X], rules=[Rule("head", algo="avg")],
                                    recover=(), progress=False)  # fmt: skip
    _, by_avg = jaxquant.quant_post(PARAMS, net, [X], algo="avg", recover=(), progress=False)
    found, wanted = thresholds(qapply.plan), thresholds(by_avg.plan)
    np.testing.assert_allclose(found["head"], wanted["head"], rtol=0.02)
    assert abs(found["body"] / wanted["body"] - 1) > 0.03


def test_a_config_is_plain_data():
    config = QuantConfig(
        algo="mse",
        skip=["head"],
        rules=[Rule("body", algo="KL", recover=["equalization"]), Rule("neck", symmetric=False),
               Rule("head", recover=())],
    )  # fmt: skip
    assert QuantConfig.from_json(config.to_json()) == config
    assert hash(QuantConfig.from_json(config.to_json())) == hash(config)
    assert json.loads(config.to_json())["rules"][1] == {"pattern": "neck", "symmetric": False}
    with pytest.raises(ValueError, match="QuantConfig: 'agro' is not known; nearest: algo"):
        QuantConfig.from_json('{"agro": "KL"}')
    own = jaxquant.histogram_observer(lambda stats, levels: [s.abs_max for s in stats])
    with pytest.raises(ValueError, match="Observer of your own cannot be written as JSON"):
        dataclasses.replace(config, algo=own).to_json()


def test_a_config_and_its_keywords_make_the_same_model(observations):
    settings = {"algo": "mse", "recover": (), "rules": (Rule("neck", algo="abs_max"),)}
    by_keywords, plan = quantize(observations, **settings)
    by_config, qapply = jaxquant.quantize(
        PARAMS, net, observations, config=QuantConfig(**settings), progress=False
    )
    assert qapply.plan == plan
    jax.tree.map(np.testing.assert_array_equal, by_keywords, by_config)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"config": {"algo": "KL"}}, TypeError, "config is a jaxquant.QuantConfig, got dict"),
        ({"config": QuantConfig(), "algo": "KL"}, ValueError, "config= and algo were given"),
        ({"config": QuantConfig(mode="dynamic", recover=(),
                                quantizable_op_type=("mul",))}, ValueError, "quant_dynamic"),
    ],
)  # fmt: skip
def test_what_is_no_config_of_quant_post_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        jaxquant.quant_post(PARAMS, net, [X], progress=False, **given)
