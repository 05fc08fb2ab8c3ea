"""Loops with int8 sites inside: what ONNX Runtime gives is what `qapply` gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def weights(*shape):
    return jnp.asarray(networks.images(sum(shape), shape)) * 0.4


def mlp(p, x, reverse=False):
    """Layers of stacked weights; a result of each step too."""

    def layer(c, w):
        h = jax.nn.gelu(c @ w["w"] + w["b"]) @ p["shared"]
        return h, h.mean(1)

    y, means = lax.scan(layer, x, p["layers"], reverse=reverse)
    return y @ p["head"], means


MLP = {
    "layers": {"w": weights(3, 8, 8), "b": weights(3, 8)},
    "shared": weights(8, 8),
    "head": weights(8, 5),
}


def convolutions(p, x):
    def layer(c, w):
        numbers = ("NHWC", "HWIO", "NHWC")
        c = jax.nn.relu6(c + 0.3)
        return lax.conv_general_dilated(c, w, (1, 1), "SAME", dimension_numbers=numbers), None

    images = jnp.broadcast_to(x[:, :, None], (x.shape[0], 6, 5, 8))
    return lax.scan(layer, images, p)[0]


def nested(p, x):
    def outer(c, w):
        inner = lax.scan(lambda h, v: (jnp.tanh(h @ v + w["b"]), None), c, w["inner"])[0]
        return inner @ w["last"], None

    return lax.scan(outer, x, p)[0]


def recurrent(p, x):
    def step(h, x):
        h = jnp.tanh(x @ p["i"] + h @ p["h"])
        return h, h

    return lax.scan(step, jnp.zeros((x.shape[0], 6)), x.swapaxes(0, 1))


def repeated(p, x):
    def step(c):
        return c[0] + 1, jnp.tanh(c[1] @ p)

    return lax.while_loop(lambda c: c[0] < 3, step, (0, x))[1]


def chosen(p, x):
    return lax.cond(x.sum() > 0, lambda y: y @ p[0], lambda y: jnp.tanh(y) @ p[1], x)


@pytest.mark.parametrize(
    ("params", "apply_fn"),
    [
        (MLP, mlp),
        (MLP, lambda p, x: mlp(p, x, reverse=True)),
        (weights(3, 3, 3, 8, 8), convolutions),
        ({"inner": weights(2, 3, 8, 8), "last": weights(2, 8, 8), "b": weights(2, 8)}, nested),
        ({"i": weights(8, 6), "h": weights(6, 6)}, recurrent),
        (weights(8, 8), repeated),
        (weights(2, 8, 8), chosen),
    ],
    ids=["mlp", "reversed", "convolutions", "nested", "recurrent", "while", "cond"],
)
def test_the_exported_loop_gives_what_qapply_gives(params, apply_fn, tmp_path):
    x = jnp.asarray(networks.images(7, (4, 6, 8)))
    options = {"algo": "abs_max", "recover": (), "progress": False}
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], **options)
    assert any(row["status"] == "int8" for row in qapply.report().rows)
    path = tmp_path / "m.onnx"
    jaxquant.export_onnx(path, qparams, qapply, progress=False)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: np.asarray(x[:2])})
    for mine, theirs in zip(jax.tree.leaves(qapply(qparams, x[:2])), found, strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-5, atol=1e-6 * np.abs(mine).max())


def test_a_scan_over_stacked_int8_weights_is_unrolled(tmp_path):
    x = jnp.asarray(networks.images(7, (4, 6, 8)))
    qparams, qapply = jaxquant.quant_post(MLP, mlp, [x], progress=False)
    zero_points = np.asarray(qparams["tensors"]["shared/input"]["zero_point"])
    assert len(set(zero_points.tolist())) > 1
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, progress=False)
    nodes = onnx.load(tmp_path / "m.onnx").graph.node
    assert not [node for node in nodes if node.op_type in ("Scan", "Loop")]
    assert sum(node.op_type in ("MatMul", "Gemm") for node in nodes) == 7
