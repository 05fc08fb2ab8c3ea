"""Learned rounding: what it may choose, what it gains, when it refuses, and how it goes on."""

from __future__ import annotations

import builtins
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.graph import evaluate
from jaxquant.graph.trace import trace
from jaxquant.recover import adaround
from jaxquant.recover.activation import RowFunction, find_activation

OPTIONS: dict[str, Any] = {"algo": "abs_max", "progress": False}


def correlated(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Few factors behind many inputs: what one weight rounds up another can make up for."""
    rng = np.random.default_rng(7)
    mixing = rng.normal(size=(4, shape[-1]))
    return (np.random.default_rng(seed).normal(size=(*shape[:-1], 4)) @ mixing).astype(np.float32)


def sqnr(reference: Any, got: Any) -> float:
    reference, got = np.float64(reference), np.float64(got)
    return 10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum())


def is_floor_or_ceil(int8: Any, ratio: np.ndarray) -> bool:
    """Whether a weight is rounded either way; `ratio` is what it was rounded from."""
    near = np.rint(ratio)
    ratio = np.where(np.abs(ratio - near) < 1e-4, near, ratio)  # the scale is float32
    int8 = np.asarray(int8, np.float64)
    return bool(((int8 >= np.floor(ratio) - 1e-6) & (int8 <= np.ceil(ratio) + 1e-6)).all())


def problem(correct: bool = False, activation: Any = jax.nn.relu) -> adaround.Problem:
    x = np.rint(correlated((512, 1, 32)) * 10)
    w = np.random.default_rng(1).normal(size=(1, 32, 8))
    step = np.abs(w).max(axis=1, keepdims=True) / 15
    ratio = w / step
    return adaround.Problem(
        inputs=x,
        wanted=(x @ w)[:, 0].astype(np.float32),
        down=np.floor(ratio).astype(np.float32),
        fraction=(ratio - np.floor(ratio)).astype(np.float32),
        nearest=np.rint(ratio) > np.floor(ratio),
        multiplier=step.reshape(-1).astype(np.float32),
        bias=np.zeros(8, np.float32),
        activation=activation,
        correct=correct,
    )


@pytest.mark.parametrize("correct", [False, True])
def test_correlated_inputs_gain_on_what_was_held_out(correct: bool):
    p = problem(correct)
    found = adaround.learn(p, steps=300)
    assert found.learned < found.nearest / (2 if correct else 4)
    assert found.up.dtype == bool
    assert (found.up != p.nearest).mean() > 0.02
    test = p._replace(inputs=p.inputs[384:], wanted=p.wanted[384:])
    if not correct:
        assert adaround.errors(test, found.up) == pytest.approx(found.learned)
        assert adaround.errors(test, p.nearest) == pytest.approx(found.nearest)


def test_weights_on_the_grid_stay():
    p = problem()
    fraction = np.where(np.arange(32)[:, None] % 2 == 0, 0, p.fraction).astype(np.float32)
    p = p._replace(fraction=fraction, nearest=fraction > 0.5)
    up = adaround.learn(p, steps=100).up
    assert not up[:, ::2].any()


def test_no_step_or_no_time_gives_nearest_rounding():
    p = problem()
    np.testing.assert_array_equal(adaround.learn(p, steps=0).up, p.nearest)
    late = adaround.learn(p, steps=10_000, seconds=0.0)  # stops at the first look at the clock
    assert late.up.shape == p.nearest.shape


def test_a_rounding_that_is_worse_on_what_was_held_out_is_not_taken():
    """The held-out positions want the opposite of the others."""
    p = problem(activation=lambda y: y)
    wanted = p.wanted.copy()
    wanted[:384] += 3 * np.abs(p.inputs[:384, 0]).mean(axis=1, keepdims=True)
    p = p._replace(wanted=wanted)
    found = adaround.learn(p, steps=200)
    assert found.learned >= found.nearest
    np.testing.assert_array_equal(found.up, p.nearest)


def test_the_relaxation_reaches_zero_and_one():
    h = np.asarray(adaround.soft(jnp.asarray([-10.0, -2.5, 0.0, 2.5, 10.0], jnp.float32)))
    np.testing.assert_allclose(h, [0, 0, 0.5, 1, 1], atol=1e-6)


def network() -> tuple[Any, Any, np.ndarray]:
    """A dense, a dilated, a grouped and a depthwise convolution, and a dot."""
    rng = np.random.default_rng(0)
    shapes = {
        "a": (3, 3, 8, 8),
        "d": (3, 3, 8, 8),
        "g": (3, 3, 4, 8),
        "w": (3, 3, 1, 8),
        "f": (8, 4),
    }
    params = {k: jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1])), jnp.float32)
              for k, s in shapes.items()}  # fmt: skip

    def conv(x: Any, w: Any, groups: int = 1, dilation: int = 1) -> Any:
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    def apply_fn(p: Any, x: Any) -> Any:
        y = jax.nn.relu(conv(x, p["a"]))
        y = jax.nn.relu6(conv(y, p["d"], dilation=2) + 0.5)
        y = jax.nn.swish(conv(y, p["g"], groups=2))
        return conv(y, p["w"], groups=8).mean((1, 2)) @ p["f"]

    return params, apply_fn, correlated((64, 6, 6, 8), seed=3)


@pytest.fixture(scope="module")
def learned() -> Any:
    params, apply_fn, x = network()
    with jax.numpy_dtype_promotion("strict"):
        return {
            recover: jaxquant.quant_post(
                params, apply_fn, [x[:16], x[16:32]], recover=recover, **OPTIONS
            )
            for recover in ((), ("adaround", "equalization", "bias_correction"))
        }


def test_every_kind_of_site_is_learned_and_hardened(learned: Any):
    params = network()[0]
    qparams, qapply = list(learned.values())[1]
    summary = qapply.report().summary["recovery"]
    assert list(summary) == ["equalization", "adaround", "bias_correction"]
    assert " of 5 sites" in summary["adaround"]
    changed = 0
    channels = {tensor.name: tensor for tensor in qapply.plan.tensors}
    for name, weight in params.items():
        int8 = np.asarray(qparams["params"][name]["int8"])
        assert int8.dtype == np.int8
        assert np.abs(int8.astype(int)).max() <= 127
        tensor = channels[f"{name}/input"]
        e = np.asarray(qparams["tensors"][tensor.name]["scale"], np.float64) / tensor.scale
        rows = np.asarray(weight, np.float64)
        if name == "g":
            e = np.broadcast_to(e, 8).reshape(2, 4).repeat(4, axis=0).T
        elif name != "w":  # that of a depthwise convolution is in its scales
            e = np.broadcast_to(e, weight.shape[-2])[:, None]
        scale = np.asarray(qparams["params"][name]["scale"], np.float64)
        threshold = np.abs(rows * e).max(axis=tuple(range(weight.ndim - 1)))
        assert (scale * 127 >= threshold * (1 - 1e-6)).all()
        ratio = rows * e / scale
        assert is_floor_or_ceil(int8, ratio)
        changed += int((np.abs(np.rint(ratio) - int8) > 0.5).sum())
    assert changed > 10


def test_a_saved_model_gives_the_same_bits(learned: Any, tmp_path):
    x = network()[2]
    qparams, qapply = list(learned.values())[1]
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply = jaxquant.load_quantized_model(tmp_path / "model")
    assert apply.plan == qapply.plan
    jax.tree.map(np.testing.assert_array_equal, loaded, qparams)
    want = qapply.with_backend("xla")(qparams, x[:5])  # as an exported program runs
    np.testing.assert_array_equal(apply(loaded, x[:5]), want)


def test_the_whole_network_gains_on_other_samples(learned: Any):
    params, apply_fn, x = network()
    want = np.asarray(apply_fn(params, x[32:]))
    before, after = (sqnr(want, qapply(qparams, x[32:])) for qparams, qapply in learned.values())
    assert after > before + 1


def test_the_zero_points_part_of_the_bias_follows_the_weights():
    rng = np.random.default_rng(1)
    params = {"w": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)}
    x = np.abs(correlated((512, 32)))  # zero point -128
    qparams, qapply = jaxquant.quant_post(
        params, lambda p, x: x @ p["w"], [x], recover=("adaround",), **OPTIONS
    )
    (tensor,) = qapply.plan.tensors
    int8 = np.asarray(qparams["params"]["w"]["int8"], np.int64)
    arrays = qparams["sites"]["w"]
    want = 128 * int8.sum(0) * np.asarray(arrays["multiplier"], np.float64)
    assert tensor.zero_point == -128
    np.testing.assert_allclose(arrays["bias"], want, rtol=1e-6)
    assert "adaround: 1 of 1 sites" in str(qapply.report())


def test_sites_that_cannot_be_learned_say_why():
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32)
              for k, s in {"w": (8, 8), "b": (2, 4, 3), "f": (8, 2)}.items()}  # fmt: skip

    def apply_fn(p: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ p["w"]) @ p["w"]
        heads = y.reshape(*y.shape[:-1], 2, 4)
        return jnp.einsum("bnhk,hko->bnho", heads, p["b"]), y.mean(axis=(0, 1)) @ p["f"]

    x = correlated((2, 16, 8))
    plain, _ = jaxquant.quant_post(params, apply_fn, [x], recover=(), **OPTIONS)
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=("adaround",), **OPTIONS)
    note = qapply.report().summary["recovery"]["adaround"]
    assert note.startswith("0 of 4 sites (")
    assert "w, w:1: it shares its weight with another site" in note
    assert "b: its weight has batch axes" in note
    assert "f: 1 output positions are too few" in note
    jax.tree.map(np.testing.assert_array_equal, plain["params"], qparams["params"])


def test_sites_behind_attention_and_gelu_are_learned():
    """What is computed as one elsewhere is read by its own equations here."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {name: jax.random.normal(key, (8, 8)) for name, key in zip("qvo", keys, strict=True)}

    def apply_fn(p: Any, x: Any) -> Any:
        scores = jnp.einsum("btd,bsd->bts", x @ p["q"], x) / 8
        return jax.nn.gelu(jax.nn.softmax(scores) @ (x @ p["v"]), approximate=False) @ p["o"]

    x = correlated((32, 16, 8))
    _, qapply = jaxquant.quant_post(params, apply_fn, [x], recover=("adaround",), **OPTIONS)
    note = qapply.report().summary["recovery"]["adaround"]
    assert note.startswith("3 of 3 sites"), note


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(8, 8)), jnp.float32) for k in "ab"}

    def apply_fn(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    x, path = correlated((64, 8)), tmp_path / "new" / "roundings.safetensors"
    options = {**OPTIONS, "recover": ("adaround", "bias_correction")}
    whole, _ = jaxquant.quant_post(params, apply_fn, [x], **options)
    learn, calls = adaround.learn, []

    def interrupted(problem: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return learn(problem)

    monkeypatch.setattr(adaround, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jaxquant.quant_post(params, apply_fn, [x], recovery_file=path, **options)
    assert [p.name for p in path.parent.iterdir()] == ["roundings.safetensors"]
    resumed, _ = jaxquant.quant_post(params, apply_fn, [x], recovery_file=path, **options)
    assert len(calls) == 3  # the second site alone
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_without_optax_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "optax":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    read: list[Any] = []
    with pytest.raises(ImportError, match=r"optax.*recover"):
        jaxquant.quant_post(
            {"w": jnp.ones((2, 2))}, lambda p, x: x @ p["w"], (read.append(x) for x in [1]),
            recover=("adaround",), **OPTIONS,
        )  # fmt: skip
    assert not read  # before any work


def test_an_activation_of_rows_is_that_of_the_tensor():
    """Literals and broadcast scalars pass; two that compute the same are equal."""

    def function(apply_fn: Any) -> Any:
        params = {"a": jnp.float32(0.1), "c": jnp.ones((1, 1, 4)) / 8}
        x = np.ones((2, 3, 4), np.float32)
        graph = trace(lambda p, x: apply_fn(p, jnp.sin(x)), params, (x,))
        start = graph.equations[0].outputs[0]
        activation = find_activation(graph, start)
        env = evaluate.evaluate(graph, dict(zip(graph.leaves, jax.tree.leaves(params))), [x])
        scalars = activation.scalars(env)
        return None if scalars is None else RowFunction(graph, activation, scalars)

    value = jnp.linspace(-9, 9, 20, dtype=jnp.float32).reshape(5, 4)
    leaky = function(lambda p, x: jnp.where(x > 0, x, p["a"] * x))
    for row, plain in (
        (function(lambda p, x: jax.nn.relu6(x)), jax.nn.relu6),
        (function(lambda p, x: jax.nn.swish(x)), jax.nn.swish),
        (leaky, lambda x: jnp.where(x > 0, x, jnp.float32(0.1) * x)),
    ):
        np.testing.assert_allclose(row(value), plain(value), rtol=1e-6)
    assert leaky == function(lambda p, x: jnp.where(x > 0, x, p["a"] * x))
    assert leaky != function(lambda p, x: jnp.where(x > 0, x, 2 * p["a"] * x))
    assert hash(leaky) == hash(function(lambda p, x: jnp.where(x > 0, x, p["a"] * x)))
    assert function(lambda p, x: jnp.maximum(x, p["c"] * x)) is None  # a number a channel


def test_what_padding_holds_is_not_learned_from():
    """Whatever lies there, the roundings are those of the positions that count."""
    x, mask = correlated((24, 6, 8)), np.arange(6) < np.arange(24)[:, None] % 6
    weight = np.random.default_rng(3).normal(size=(8, 4)).astype(np.float32)

    def roundings(padding: np.ndarray) -> np.ndarray:
        qparams, _ = jaxquant.quant_post(
            {"w": weight},
            lambda p, x, mask: x @ p["w"] + 0 * mask[..., None],
            [(np.where(mask[..., None], x, padding), mask.astype(np.float32))],
            mask=1,
            algo="abs_max",
            recover=("adaround",),
            progress=False,
        )
        return np.asarray(qparams["params"]["w"]["int8"])

    zeros, others = np.zeros_like(x), 2 * correlated(x.shape, seed=9)
    np.testing.assert_array_equal(roundings(zeros), roundings(others))
