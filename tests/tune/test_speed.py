"""`optimize_for="speed"`: what is slower in int8 stays float, and the report says so."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.tune import speed
from jaxquant.tune.goal import Goal
from jaxquant.tune.one_site import BothForms
from tests import networks
from tests.analysis import faults
from tests.analysis.test_analyze import accuracy
from tests.tune.test_control import controlled

X = networks.images()
REASON = "int8 runs 1.35 times as long as float here (optimize_for='speed')"
ALL = {"is_full_quantize": True}


@pytest.fixture
def slow(monkeypatch):
    """Sets which sites are slow, by the shapes of their operands, and keeps what was timed."""

    def set_slow(*shapes):
        seen = []

        def slowdown(timed):
            params, _, inputs = timed.arguments
            seen.append(tuple(x.shape for x in jax.tree.leaves((params, inputs))))
            return 1.35 if not shapes or seen[-1] in shapes else 1.0

        monkeypatch.setattr(speed, "slowdown", slowdown)
        return seen

    return set_slow


def plain_net(**config):
    return networks.quantize(networks.plain_params(), networks.plain_net, X, **config)


def reasons(qapply):
    rows = networks.rows(qapply)
    return {name: row["reason"] for name, row in rows.items() if row["status"] == "float"}


def test_what_is_slower_stays_float_and_is_what_a_skip_gives(slow, tmp_path):
    timed = slow(((3, 3, 1, 8), (4, 4, 4, 8)), ((12, 5), (4, 12)))
    qparams, qapply = plain_net(optimize_for="speed")
    assert reasons(qapply) == {"depthwise": REASON, "head": REASON}
    assert len(set(timed)) == 4
    others, by_skip = plain_net(skip=("depthwise", "head"))
    jax.tree.map(np.testing.assert_array_equal, qparams, others)
    np.testing.assert_array_equal(qapply(qparams, X), by_skip(others, X))
    assert REASON in " ".join(str(qapply.report()).split())
    path = tmp_path / "model.safetensors"
    jaxquant.save_quantized_model(path, qparams, qapply)
    loaded = jaxquant.load_quantized_model(path)[1]
    assert loaded.plan == qapply.plan


def test_for_size_nothing_is_timed(slow):
    timed = slow()
    assert reasons(plain_net()[1]) == {}
    assert timed == []


def test_quant_post_passes_it_on(slow):
    slow(((3, 3, 3, 8), (4, 8, 8, 3)))
    _, qapply = jaxquant.quant_post(
        networks.plain_params(), networks.plain_net, [X], progress=False, optimize_for="speed"
    )
    assert reasons(qapply) == {"stem": REASON}


def test_equal_sites_are_timed_once(slow):
    params = {name: networks.images(k, (6, 6)) for k, name in enumerate("abcd")}
    params["e"] = networks.images(5, (6, 4))

    def apply_fn(p, x):
        for name in "abcd":
            x = x @ p[name]
        return x @ p["e"]

    x = networks.images(9, (8, 6))
    timed = slow(((6, 6), (8, 6)))
    _, qapply = networks.quantize(params, apply_fn, x, optimize_for="speed")
    # The first reads a model input, the others what is computed.
    assert timed == [((6, 6), (8, 6))] * 2 + [((6, 4), (8, 6))]
    assert reasons(qapply) == dict.fromkeys("abcd", REASON)


def test_neighbours_of_what_stays_float_are_timed_again(slow):
    params = {"a": networks.images(0, (6, 7)), "b": networks.images(1, (7, 8))}
    params |= {"c": networks.images(2, (8, 9))}
    a, b, c = ((6, 7), (5, 6)), ((7, 8), (5, 7)), ((8, 9), (5, 8))
    timed = slow(c)
    _, qapply = networks.quantize(
        params,
        lambda p, x: x @ p["a"] @ p["b"] @ p["c"],
        networks.images(3, (5, 6)),
        optimize_for="speed",
    )
    assert reasons(qapply) == {"c": REASON}
    assert timed == [a, b, c, b]  # nothing quantizes what b gives any more


def test_skipped_sites_are_not_timed(slow):
    timed = slow(((3, 3, 3, 8), (4, 8, 8, 3)))
    _, qapply = plain_net(optimize_for="speed", skip=("stem", "point"))
    assert set(timed) == {((3, 3, 1, 8), (4, 4, 4, 8)), ((12, 5), (4, 12))}
    assert reasons(qapply) == {"stem": "skip='stem'", "point": "skip='point'"}


def test_nothing_left_says_why(slow):
    slow()
    why = re.escape(f"no site is left to quantize (conv2d: {REASON}; depthwise_conv2d: {REASON}")
    with pytest.raises(ValueError, match=why):
        plain_net(optimize_for="speed")


def test_with_full_quantization_the_other_kinds_stay_int8(slow):
    slow()
    params = networks.plain_params()
    observations = jaxquant.calibrate(params, networks.plain_net, [X], progress=False, **ALL)
    _, qapply = jaxquant.quantize(
        params, networks.plain_net, observations, optimize_for="speed", progress=False, **ALL
    )
    assert set(reasons(qapply).values()) == {REASON}
    status = {name: row["status"] for name, row in networks.rows(qapply).items()}
    assert {name for name, found in status.items() if found == "float"} == {
        "stem", "depthwise", "point", "head"}  # fmt: skip
    assert status["pool2d"] == "int8"


@pytest.mark.filterwarnings("ignore:the quantized model's outputs")
def test_accuracy_control_leaves_other_sites_in_float_on_top(slow):
    fault = faults.outlier_input_channel()
    batch = fault.images[:64]
    slow(((32, 8), (64, 32)))
    goal = Goal(accuracy(fault), max_drop=0.03, algos=(), recovery=())
    _, qapply = controlled(fault, goal, batch, optimize_for="speed")
    found = reasons(qapply)
    assert found.pop("e") == REASON
    assert fault.site in found
    assert set(found.values()) == {"left in float for the sake of the metric (max_drop)"}
    assert "e" not in qapply.report().summary["control"]["ranking"]


def test_a_real_timing_gives_a_valid_model():
    """Which sites are float is not known here."""

    def apply_fn(p, x):
        y = networks.plain_net(p, x)
        return jnp.einsum("ab,cb->ac", y, y)

    params = networks.plain_params()
    observations = jaxquant.calibrate(params, apply_fn, [X], progress=False, **ALL)
    qparams, qapply = jaxquant.quantize(
        params, apply_fn, observations, optimize_for="speed", progress=False, **ALL
    )
    told = r"int8 runs \d+\.\d\d times as long as float here \(optimize_for='speed'\)"
    assert all(re.fullmatch(told, reason) for reason in reasons(qapply).values())
    assert len(networks.rows(qapply)) >= 6
    got, want = qapply(qparams, X), apply_fn(params, X)
    np.testing.assert_allclose(got, want, atol=0.1 * np.abs(want).max())


ROUNDS = speed.MOST_ROUNDS


@pytest.mark.parametrize(
    ("int8", "expected", "rounds"),
    [
        ([2.0], 2.0, ROUNDS),
        ([0.5], 1.0, speed.LEAST_ROUNDS),  # clear at once
        ([0.5, 0.5, 1.5], 1.0, ROUNDS),
        ([0.9, 1.2], 1.0, ROUNDS),  # no more than a matter of chance
        ([0.9, 1.2, 1.3, 1.3, 1.3, 1.3], 1.3, ROUNDS),
    ],
)
def test_int8_is_slower_where_three_rounds_of_four_say_so(clock, int8, expected, rounds):
    calls, times = [], itertools.chain([99.0], itertools.cycle(int8))
    forms = both_forms(clock, calls, lambda: 1e-6, lambda: 1e-6 * next(times))
    assert speed.slowdown(forms) == pytest.approx(expected)
    assert calls == ["float", "int8"] * (1 + rounds)


def test_a_slow_site_gets_fewer_rounds(clock):
    calls = []
    forms = both_forms(clock, calls, lambda: 1.0, lambda: 50.0)
    assert speed.slowdown(forms) == 50.0
    assert calls == ["float", "int8"] * 4


@pytest.fixture
def clock(monkeypatch):
    """What the time is, in seconds."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def both_forms(clock, calls, *seconds):
    """Two programs that take the given times and say that they ran."""

    def program(name, its_seconds):
        def run(result):
            calls.append(name)
            clock[0] += its_seconds()
            return result

        return run

    forms = map(program, ("float", "int8"), seconds)
    return BothForms(*forms, (), jax.ShapeDtypeStruct((1,), jnp.float32))
