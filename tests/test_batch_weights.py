"""Weights that a model makes for its batch: learned queries, copies of a layer for each sample."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks

KINDS = ("conv2d", "depthwise_conv2d", "mul", "matmul")
PARAMS = {
    name: networks.images(number, shape)
    for number, (name, shape) in enumerate(
        {
            "probe": (1, 3, 8), "q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8),
            "ensemble": (5, 8, 4), "kernel": (2, 1, 3, 3),
        }.items()
    )
}  # fmt: skip
X = networks.images(50, (24, 4, 8))


def scores(query: Any) -> Any:
    return lambda p, x: jnp.einsum("bqd,bkd->bqk", query(p, x.shape[0]), x @ p["k"])


def norm(x: jax.Array) -> jax.Array:
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def heads(p: Any, x: jax.Array, merged: bool) -> jax.Array:
    """SigLIP's pooling head: a normalized and projected query, with the heads in their own axis."""
    batch = x.shape[0]
    query = norm(jnp.broadcast_to(p["probe"], (batch, 3, 8))) @ p["q"]
    q, k, v = (
        t.reshape(batch, t.shape[1], 2, 4).transpose(0, 2, 1, 3)
        for t in (query, x @ p["k"], x @ p["v"])
    )
    if merged:
        q, k, v = (t.reshape(batch * 2, t.shape[2], 4) for t in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("...qd,...kd->...qk", q, k) / 2, axis=-1)
    out = jnp.einsum("...qk,...kd->...qd", weights, v).reshape(batch, 2, 3, 4)
    return out.transpose(0, 2, 1, 3).reshape(batch, 3, 8) @ p["o"]


def decoder(p: Any, x: jax.Array) -> jax.Array:
    """DETR: queries that attend to each other before they see the input; matmuls of batches."""
    queries = jnp.zeros((x.shape[0], 3, 8)) + p["probe"]
    own = jax.nn.softmax((queries @ p["q"]) @ jnp.swapaxes(queries @ p["k"], 1, 2), axis=-1)
    state = norm(own @ queries + queries)
    cross = jax.nn.softmax((state @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2), axis=-1)
    return norm(state + cross @ (x @ p["v"])) @ p["o"]


def convolved(p: Any, x: jax.Array) -> jax.Array:
    """A kernel for each sample: `jax.vmap` makes groups of them."""
    kernels = jnp.broadcast_to(p["kernel"], (x.shape[0], 2, 1, 3, 3))

    def conv(w, x):
        return lax.conv(x[None, None], w, (1, 1), "SAME")[0]

    return jax.vmap(conv)(kernels, x) + x[:, None] @ p["k"]


# name: (function, the shape in which the query or layer is stored; None: float, as it is)
MODELS = {
    "broadcast": (scores(lambda p, b: jnp.broadcast_to(p["probe"], (b, 3, 8))), (1, 3, 8)),
    "tile": (scores(lambda p, b: jnp.tile(p["probe"], (b, 1, 1))), (1, 3, 8)),
    "repeat": (scores(lambda p, b: jnp.repeat(p["probe"], b, axis=0)), (1, 3, 8)),
    "scaled": (scores(lambda p, b: jnp.broadcast_to(p["probe"], (b, 3, 8)) * 2.0), (1, 3, 8)),
    "rows": (scores(lambda p, b: jnp.tile(p["probe"][0], (b, 1)).reshape(b, 3, 8)), None),
    "second": (
        lambda p, x: jnp.einsum(
            "bkd,bqd->bkq", x @ p["k"], jnp.broadcast_to(p["probe"], (x.shape[0], 3, 8))
        ),
        (1, 3, 8),
    ),
    "heads": (lambda p, x: heads(p, x, merged=False), (1, 2, 3, 4)),
    "merged": (lambda p, x: heads(p, x, merged=True), None),
    "decoder": (decoder, None),
    "layers": (
        lambda p, x: jax.vmap(jnp.matmul)(x, jnp.broadcast_to(p["k"], (x.shape[0], 8, 8))),
        (1, 8, 8),
    ),
    "kernels": (convolved, None),
    "class": (
        lambda p, x: jnp.concatenate(
            [jnp.broadcast_to(p["probe"][:, :1], (x.shape[0], 1, 8)), x @ p["k"]], axis=1
        )
        @ p["v"],
        None,
    ),
}  # fmt: skip


def quantize(fn: Any, mode: str, batch: int) -> Any:
    with warnings.catch_warnings():
        # one sample calibrates badly, which is not what is looked at here
        warnings.filterwarnings("ignore", "the quantized model's outputs", UserWarning)
        if mode == "static":
            return jaxquant.quant_post(
                PARAMS, fn, [X[:batch]], quantizable_op_type=KINDS, recover=(), progress=False
            )
        if mode == "dynamic":
            return jaxquant.quant_dynamic(PARAMS, fn, X[:batch], quantizable_op_type=KINDS)
        return jaxquant.quant_weights(PARAMS, fn, X[:batch])


def stored(qparams: Any) -> list[tuple[int, ...]]:
    flat = jax.tree_util.tree_flatten_with_path(qparams["params"])[0]
    return [leaf.shape for path, leaf in flat if path[-1].key.startswith("int8")]


CASES = [(name, "static") for name in MODELS if name not in ("repeat", "scaled")]
CASES += [(name, "dynamic") for name in ("second", "repeat")]
CASES += [(name, "weights") for name in ("scaled", "heads", "merged")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_any_batch_gives_what_the_whole_gives(name, mode):
    fn, shape = MODELS[name]
    qparams, qapply = quantize(fn, mode, 4)
    whole = np.asarray(qapply(qparams, X[:6]))
    wanted = np.asarray(jax.jit(fn)(PARAMS, X[:6]))
    assert np.linalg.norm(whole - wanted) < 0.15 * np.linalg.norm(wanted)
    for batch in (1, 3) if name in ("broadcast", "decoder", "kernels") else (1,):
        np.testing.assert_allclose(qapply(qparams, X[:batch]), whole[:batch], atol=2e-3, rtol=1e-3)
    shapes = stored(qparams)
    if shape is not None and mode != "weights":
        assert shape in shapes
    assert not any(4 in shape[:1] or (8 in shape[:1] and len(shape) > 2) for shape in shapes)


@pytest.mark.parametrize("name", ["broadcast", "tile", "merged", "decoder", "kernels"])
def test_a_batch_of_one_does_not_hide_it(name):
    fn, _ = MODELS[name]
    one, many = (quantize(fn, "dynamic", batch) for batch in (1, 4))
    np.testing.assert_allclose(one[1](one[0], X[:3]), many[1](many[0], X[:3]), atol=1e-5, rtol=1e-5)
    assert stored(one[0]) == stored(many[0])


def test_an_ensemble_keeps_the_batch_axis_of_its_weight():
    def fn(p, x):
        return jax.vmap(lambda w: x @ w)(p["ensemble"])

    def each(p, x):
        return jnp.einsum("ebkd,edf->ebkf", jnp.stack([x] * 5), p["ensemble"])

    for model in (fn, each):
        qparams, qapply = quantize(model, "dynamic", 2)
        assert stored(qparams) == [(5, 8, 4)]
        wanted = np.asarray(model(PARAMS, X[:3]))
        got = np.asarray(qapply(qparams, X[:3]))
        assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)


def test_rearrangements_that_one_batch_lacks_are_no_other_graph():
    def attend(p, x):
        return jax.nn.softmax((x @ p["q"]) @ jnp.swapaxes(x @ p["k"], 1, 2)) @ x

    qparams, qapply = jaxquant.quant_post(
        PARAMS, attend, [X[:4]], is_full_quantize=True, progress=False
    )
    whole = qapply(qparams, X[:4])
    np.testing.assert_allclose(qapply(qparams, X[:1]), whole[:1], atol=1e-5)


def test_a_weight_of_another_length_of_sequence_is_another_graph():
    def mixed(p, x):
        return jnp.einsum("st,btd->bsd", jnp.ones((x.shape[1],) * 2) * p, x)

    qparams, qapply = jaxquant.quant_dynamic(jnp.float32(0.5), mixed, X[:2])
    with pytest.raises(ValueError, match="another graph"):
        qapply(qparams, X[:2, :3])


def test_report_says_which_weight_is_made_for_the_batch():
    _, qapply = quantize(MODELS["merged"][0], "weights", 2)
    reasons = [row["reason"] for row in qapply.report().rows]
    assert "its weight is made to the size of the batch" in reasons


@pytest.mark.parametrize("name", ["broadcast", "merged"])
def test_a_saved_model_serves_any_batch(name, tmp_path):
    qparams, qapply = quantize(MODELS[name][0], "static", 4)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    for batch in (1, 3):
        np.testing.assert_array_equal(apply_loaded(loaded, X[:batch]), qapply(qparams, X[:batch]))


def test_onnx_refuses_by_name_what_is_computed_for_the_batch(tmp_path):
    pytest.importorskip("onnx")
    qparams, qapply = quantize(MODELS["merged"][0], "static", 4)
    with pytest.raises(ValueError, match="to the size of the batch"):
        jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply)
