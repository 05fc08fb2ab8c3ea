"""Recovery steps inside loops: each layer is repaired as in a Python loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.recover import adaround
from tests.loops import measure

WIDTH = 16
STEPS = ("equalization", "bias_correction")


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = np.asarray(draw(0, 64, WIDTH))


def quantize(params: Any, apply_fn: Any, batches: Any = (X[:24], X[24:48]), **options: Any) -> Any:
    options = {"recover": STEPS, "algo": "abs_max", "progress": False, **options}
    return jaxquant.quant_post(params, apply_fn, list(batches), **options)


def uneven_layers(*layers: int) -> dict[str, jax.Array]:
    """Layers of which every other one has hidden channels of very unlike ranges, one of them 0."""
    ranges = np.ones((*layers, WIDTH))
    ranges.reshape(-1, WIDTH)[::2] = np.logspace(-2, 0, WIDTH)
    inner = draw(1, *layers, WIDTH, WIDTH) / 4
    return {
        "a": inner * jnp.asarray(ranges, jnp.float32)[..., None, :].at[..., 3].set(0),
        "b": draw(2, *layers, WIDTH, WIDTH) / 8 / jnp.asarray(ranges, jnp.float32)[..., None],
    }


def layer(x: jax.Array, p: Any) -> jax.Array:
    return x + jax.nn.gelu(x @ p["a"]) @ p["b"]


def scanned(p: Any, x: jax.Array) -> jax.Array:
    def inner(x: jax.Array, p: Any) -> Any:
        return layer(x, p), None

    def outer(x: jax.Array, p: Any) -> Any:
        return lax.scan(inner, x, p, reverse=True)[0], None

    return lax.scan(outer, x, p["layers"], unroll=2)[0] @ p["head"]


def by_hand(p: Any, x: jax.Array) -> jax.Array:
    for some in p["layers"]:
        for each in reversed(some):
            x = layer(x, each)
    return x @ p["head"]


LAYERS, HEAD = uneven_layers(2, 2), draw(3, WIDTH, 4)
APART = [[jax.tree.map(lambda w, k=(i, j): w[k], LAYERS) for j in (0, 1)] for i in (0, 1)]


def assert_layers_are_alike(qparams: Any, others: Any) -> None:
    """The stacked arrays are those of the layers in a Python loop, bit for bit."""
    found = measure.flat(qparams)
    for path, array in measure.flat(others).items():
        parts = path.split("/")
        numbers = tuple(int(part) for part in parts if part.isdigit())
        ours = found["/".join(part for part in parts if not part.isdigit())][numbers]
        np.testing.assert_array_equal(ours, np.broadcast_to(array, ours.shape), path)


def test_layers_of_nested_scans_are_equalized_as_in_a_python_loop():
    qparams, qapply = quantize({"layers": LAYERS, "head": HEAD}, scanned)
    others, unrolled = quantize({"layers": APART, "head": HEAD}, by_hand)
    assert_layers_are_alike(qparams, others)
    divided = {tensor.name for tensor in qapply.plan.tensors if tensor.channels}
    assert {"layers/b/input[0][0]", "layers/b/input[1][0]"} <= divided
    assert "layers/b/input[0][1]" not in divided
    assert qparams["tensors"]["layers/b/input"]["scale"].shape == (2, 2, WIDTH)
    told = qapply.report().summary["recovery"]["equalization"]
    assert told == unrolled.report().summary["recovery"]["equalization"]
    np.testing.assert_allclose(qapply(qparams, X), unrolled(others, X), rtol=0, atol=1e-5)


def repeated(p: Any, x: jax.Array) -> jax.Array:
    """Layers that have their second weight in common, then a loop over one layer."""

    def step(x: jax.Array, a: jax.Array) -> Any:
        return layer(x, {"a": a, "b": p["b"]}), None

    x = lax.scan(step, x, p["a"])[0]
    start = jnp.zeros((), jnp.int32), x
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, layer(c[1], p["loop"])), start)[
        1
    ]


def test_what_steps_have_in_common_is_divided_alike():
    one = jax.tree.map(lambda w: w[0], uneven_layers(1))
    params = {"a": jnp.stack([one["a"], one["a"] * 2]), "b": one["b"], "loop": one}
    found = {}
    for recover in ((), ("equalization",)):
        qparams, qapply = quantize(params, repeated, recover=recover)
        found[recover] = measure.sqnr(repeated(params, X[48:]), qapply(qparams, X[48:]))
    assert found[("equalization",)] > found[()] + 3

    tensors = {tensor.name: tensor for tensor in qapply.plan.tensors}
    assert tensors["loop/b/input"].channels == (1,)
    assert qparams["params"]["b"]["int8"].shape == (WIDTH, WIDTH)
    scales = np.asarray(qparams["tensors"]["b/input"]["scale"])
    steps = np.float32([[tensors[f"b/input[{k}]"].scale] for k in (0, 1)])
    assert steps[0] != steps[1]
    factors = scales / steps
    np.testing.assert_allclose(factors[0], factors[1], rtol=1e-6)
    assert factors.max() > 2 * factors.min()


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[adaround.Problem]:
    """What was learned from; nothing is, but a rounding is taken that depends on all of it."""
    found: list[adaround.Problem] = []

    def learn(problem: adaround.Problem) -> adaround.Learned:
        found.append(problem)
        seen = (problem.wanted > 0).mean() + (problem.inputs > 3).mean()
        return adaround.Learned(problem.fraction > 0.3 + 0.2 * seen, 2.0, 1.0)

    monkeypatch.setattr(adaround, "learn", learn)
    return found


def test_layers_are_rounded_in_turn_as_in_a_python_loop(problems: Any, tmp_path: Any):
    options = {"recover": ("adaround", "equalization"), "recovery_file": tmp_path / "roundings"}
    qparams, qapply = quantize({"layers": LAYERS, "head": HEAD}, scanned, **options)
    own = [*problems]
    problems.clear()
    others, _ = quantize({"layers": APART, "head": HEAD}, by_hand, recover=options["recover"])
    assert len(own) == len(problems) == 9
    for ours, theirs in zip(own, problems, strict=True):
        np.testing.assert_array_equal(ours.inputs, theirs.inputs)
        np.testing.assert_allclose(ours.wanted, theirs.wanted, rtol=1e-5, atol=1e-5)
    assert_layers_are_alike(qparams, others)
    assert qapply.report().summary["recovery"]["adaround"] == "9 of 9 sites"

    problems.clear()  # what the file has is not learned again
    again, _ = quantize({"layers": LAYERS, "head": HEAD}, scanned, **options)
    assert not problems
    jax.tree.map(np.testing.assert_array_equal, again, qparams)


def test_what_steps_share_is_rounded_by_what_all_of_them_see(problems: Any):
    def apply_fn(p: Any, x: jax.Array) -> Any:
        def cell(state: jax.Array, x: jax.Array) -> Any:
            state = jnp.tanh(x + state @ p["state"])
            return state, state

        def chosen(x: jax.Array) -> jax.Array:
            return jax.nn.relu(x @ p["chosen"])

        def step(x: jax.Array, scale: jax.Array) -> Any:
            return jnp.tanh(x @ p["shared"]) * (x @ scale), None

        x = lax.scan(cell, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))[0]
        x = lax.cond(x[0, 0] < 9, chosen, lambda x: x @ p["other"], x)
        return lax.scan(step, x, p["layers"])[0]

    names = ("state", "chosen", "other", "shared")
    params = {name: draw(k, WIDTH, WIDTH) / 4 for k, name in enumerate(names, 4)}
    params["layers"] = draw(9, 2, WIDTH, WIDTH) / 4
    x = np.asarray(draw(10, 16, 5, WIDTH))
    _, qapply = quantize(params, apply_fn, [x], recover=("adaround",), allow_batch_dependence=True)
    note = qapply.report().summary["recovery"]["adaround"]
    assert note == "4 of 6 sites (shared[0], shared[1]: its layers share their weight)"
    state, choice, *layers = problems
    assert 16 < len(state.inputs) <= 16 * 5
    assert len(choice.inputs) == 16
    assert [len(problem.inputs) for problem in layers] == [16, 16]
    for problem in problems:  # rows of what a site reads beside those of what it gives
        off = adaround.errors(problem, problem.nearest)
        assert off < 1e-3 * np.square(problem.wanted).sum()
