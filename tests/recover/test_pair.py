"""Inside loops: each layer is measured and corrected as in a Python loop, steps are summed."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.recover.shift import Powers, Shift, add_powers, add_shifts

WIDTH = 16
X = np.asarray(2 + np.random.default_rng(5).normal(size=(48, WIDTH)), np.float32)


def weights(*shape: int) -> jax.Array:
    """Far from even, so that rounding them leaves a mean error."""
    values = np.random.default_rng(3).normal(size=(*shape, WIDTH, WIDTH)) ** 3
    return jnp.asarray(values / (3 * WIDTH), jnp.float32)


def quantized(params: Any, apply_fn: Any, batches: Any = (X[:24], X[24:])) -> Any:
    """Without scales that avoid ties, which are others in a loop; biases in whole steps differ."""
    return jaxquant.quant_post(
        params,
        apply_fn,
        list(batches),
        algo="abs_max",
        weight_quantize_type="abs_max",
        recover=("bias_correction",),
        progress=False,
    )


def step(x: jax.Array, w: jax.Array) -> jax.Array:
    return x + jax.nn.relu(x @ w)


def rows(qapply: Any) -> dict[str, Any]:
    return {row["name"]: row for row in qapply.report().rows}


def test_layers_of_nested_scans_have_the_biases_of_a_python_loop():
    def scanned(p: Any, x: Any) -> Any:
        def inner(x: Any, w: Any) -> Any:
            return step(x, w), None

        return jax.lax.scan(lambda x, w: jax.lax.scan(inner, x, w), x, p["w"])[0] @ p["end"]

    def loop(p: Any, x: Any) -> Any:
        for some in p["w"]:
            for w in some:
                x = step(x, w)
        return x @ p["end"]

    stacked, end = weights(2, 2), weights()
    qparams, qapply = quantized({"w": stacked, "end": end}, scanned)
    others, unrolled = quantized({"w": [list(some) for some in stacked], "end": end}, loop)

    assert qapply.report().summary["recovery"] == {"bias_correction": "2 sites"}
    found, wanted = qparams["sites"]["w"], rows(unrolled)
    assert found["bias"].shape == (2, 2, WIDTH)
    for k in np.ndindex(2, 2):
        other = others["sites"][f"w/{k[0]}/{k[1]}"]
        assert np.abs(other["bias"]).max() > 20 * other["multiplier"].min()
        off = (found["bias"][k] - other["bias"]) / other["multiplier"]
        assert np.abs(off).max() <= 1.01
    by_layer = rows(qapply)["w"]["by_layer"]
    assert [each["name"] for each in by_layer] == ["w[0][0]", "w[0][1]", "w[1][0]", "w[1][1]"]
    for key in ("own_sqnr_db", "sqnr_db"):
        of_loop = [wanted[f"w/{k[0]}/{k[1]}"][key] for k in np.ndindex(2, 2)]
        np.testing.assert_allclose([each[key] for each in by_layer], of_loop, atol=0.05)
        assert rows(qapply)["w"][key] == min(each[key] for each in by_layer)
        np.testing.assert_allclose(rows(qapply)["end"][key], wanted["end"][key], atol=0.05)
    assert json.loads(qapply.report().to_json())["rows"][0]["by_layer"] == by_layer
    assert rows(qapply)["end"]["by_layer"] is None


@pytest.mark.parametrize("kind", ["scan", "while"])
def test_steps_with_the_same_weight_are_summed(kind: str):
    """Three steps of the same values are off as much as one, and so is their sum."""

    def repeated(p: Any, x: Any) -> Any:
        def body(carry: Any, _: Any = None) -> Any:
            number, x, _ = carry
            return (number + 1, x, x @ p["w"]), None

        start = jnp.int32(0), x, jnp.zeros_like(x)
        if kind == "scan":
            return jax.lax.scan(body, start, None, length=3)[0][2]
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: body(c)[0], start)[2]

    params = {"w": weights()}
    qparams, qapply = quantized(params, repeated)
    once, alone = quantized(params, lambda p, x: x @ p["w"])
    found, wanted = rows(qapply)["w"], rows(alone)["w"]
    assert found["own_sqnr_db"] == pytest.approx(wanted["own_sqnr_db"], abs=0.05)
    assert found["sqnr_db"] == pytest.approx(wanted["sqnr_db"], abs=0.05)
    assert found["by_layer"] is None
    biases = np.asarray(qparams["sites"]["w"]["bias"]), np.asarray(once["sites"]["w"]["bias"])
    np.testing.assert_allclose(*biases, rtol=0.02, atol=0.05 * np.abs(biases[1]).max())


def test_a_choice_is_measured_in_the_branch_that_is_taken():
    def chosen(p: Any, x: Any) -> Any:
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["a"], lambda: jax.nn.relu(x @ p["b"]))

    batches = [np.abs(X[:24]), -np.abs(X[24:])]
    params = {"a": weights(), "b": -weights()}
    qparams, qapply = quantized(params, chosen, batches)
    found = rows(qapply)
    assert found["a"]["own_sqnr_db"] > 20
    assert found["b"]["own_sqnr_db"] is None  # the first batch does not come there
    for name in ("a", "b"):
        assert np.abs(qparams["sites"][name]["bias"]).max() > 0


def test_a_token_that_is_chosen_is_the_float_models():
    """Logits all but equal: the int8 model by itself goes on with other tokens."""
    table = jnp.asarray(X[:WIDTH] - X[:WIDTH].mean())

    def writing(p: Any, x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            logits = x @ p["w"]
            return table[logits.argmax(-1)], logits

        return jax.lax.scan(body, x, None, length=6)[1]

    params = {"w": jnp.asarray(1 + 0.01 * weights(), jnp.float32)}
    qparams, qapply = quantized(params, writing)
    tokens = [np.argmax(x, -1) for x in (writing(params, X[:24]), qapply(qparams, X[:24]))]
    assert (tokens[0] != tokens[1]).mean() > 0.2
    assert rows(qapply)["w"]["sqnr_db"] > 35


def test_sums_in_unlike_units_are_joined_in_the_larger():
    parts = np.float32([[3.0, 2.0, 1.0], [5.0, 7.0, 2.0**50], [0.0, 0.0, 0.0]])
    units = np.float64(parts[:, 2])
    both = add_powers(add_powers(parts[2], parts[0]), parts[1])
    signal, noise = (float((parts[:, k] * units**2).sum()) for k in (0, 1))
    np.testing.assert_allclose(Powers.of(both), (signal, noise), rtol=1e-6)

    lost = add_powers(np.float32([1.0, np.inf, 1.0]), parts[1])
    assert Powers.of(lost).noise == np.inf

    shifts = np.float32(np.arange(12).reshape(2, 3, 2))
    joined = Shift.of(add_shifts(shifts[0], parts[0, 2], shifts[1], parts[1, 2]), both[2])
    wanted = sum(Shift.of(shifts[k], parts[k, 2]).sums() for k in (0, 1))
    np.testing.assert_allclose(joined.sums(), wanted, rtol=1e-6)


def test_a_loop_that_steps_as_its_values_ask_for():
    """Each form takes steps of its own size, by itself; they are compared step by step."""

    def apply_fn(p: Any, x: Any) -> Any:
        def advance(carry: Any) -> Any:
            time, y = carry
            slope = jnp.tanh(y @ p["a"]) @ p["b"] - y
            # The float form is so near to the bound in one step that the int8 form is beyond it.
            is_slow = jnp.abs(slope[0]).max() < 3.06
            size = jnp.where(is_slow, jnp.float32(0.3), jnp.float32(0.02))
            return time + size, y + size * slope

        return jax.lax.while_loop(lambda carry: carry[0] < 1, advance, (jnp.float32(0), x))[1]

    params = {"a": 3 * weights(), "b": 3 * weights()}
    qparams, qapply = quantized(params, apply_fn, [X[:24]])
    wanted, got = apply_fn(params, X[:24]), qapply(qparams, X[:24])
    noise = 10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum())
    assert abs(qapply.report().summary["output_sqnr_db"] - noise) < 0.5
    assert min(row["sqnr_db"] for row in qapply.report().rows) > 30
