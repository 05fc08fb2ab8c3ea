"""ONNX files of convolutions and dots whose operands get their scales in each call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime
from tests.run.test_dynamic import DOTS, shapes
from tests.run.test_dynamic_rules import CHAIN, ROWS


def agree(tmp_path, qparams, qapply, inputs, **settings):
    """The file gives what qapply gives, on other rows than those of the trace."""
    jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply, progress=False, **settings)
    found = runtime.run(tmp_path / "model.onnx", inputs)
    expected = jax.tree.leaves(qapply(qparams, inputs))
    for ours, theirs in zip(expected, found, strict=True):
        assert theirs.shape == ours.shape
        assert runtime.sqnr(ours, theirs) > 100


@pytest.mark.parametrize("processors", ["any", "vnni"])
def test_every_form_of_dot(tmp_path, processors):
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=d[2]).astype(np.float32) for name, d in DOTS.items()}
    inputs = {name: rng.normal(size=d[1]).astype(np.float32) for name, d in DOTS.items()}
    inputs["dense"][1] = 0

    def net(p, x):
        found = {}
        for name, (equation, *_) in DOTS.items():
            pair = (p[name], x[name]) if name == "left" else (x[name], p[name])
            found[name] = jnp.einsum(equation, *pair)
        tokens = x["tokens"]
        found["pair"] = jnp.einsum("btk,bsk->bts", tokens, 2 * tokens)
        return found | {"itself": jnp.einsum("btk,bsk->bts", tokens, tokens)}

    sizes = shapes(inputs)
    qparams, qapply = jaxquant.quant_dynamic(params, net, sizes, progress=False)
    texts = {name: ", ".join(map(str, d[1])) for name, d in DOTS.items()}
    agree(tmp_path, qparams, qapply, inputs, processors=processors, shapes=(texts,))


@pytest.mark.parametrize("opset", [17, 21])
def test_single_dynamic_dots_between_static_ones(tmp_path, opset):
    def net(p, x):
        h = jax.nn.relu(x @ p["first"])
        return (h @ p["second"]) @ p["last"] + h @ p["aside"]

    qparams, qapply = jaxquant.quant_post(
        CHAIN, net, [ROWS], recover=("equalization", "bias_correction"), progress=False,
        rules=[jaxquant.Rule("second", dynamic=True)],
    )  # fmt: skip
    agree(tmp_path, qparams, qapply, ROWS[5:12], opset=opset)


def test_attention_and_dense_layers(tmp_path):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return nn.Dense(4)(nn.relu(nn.Dense(12)(x)))

    x = networks.images(0, (6, 5, 8))
    variables = Block().init(jax.random.key(0), x)
    qparams, qapply = jaxquant.quant_dynamic(variables, Block().apply, x, progress=False)
    agree(tmp_path, qparams, qapply, x[:3])


def test_dynamic_dots_of_scanned_layers(tmp_path):
    def scanned(p, x):
        return jax.lax.scan(lambda x, w: (x + jax.nn.relu(x) @ w, None), x, p["w"])[0]

    params = {"w": networks.images(0, (3, 6, 6)) / 3}
    qparams, qapply = jaxquant.quant_dynamic(params, scanned, ROWS, progress=False)
    agree(tmp_path, qparams, qapply, ROWS[:5])


@pytest.mark.parametrize("processors", ["any", "vnni"])
def test_every_form_of_convolution(tmp_path, processors):
    layout = ("NHWC", "HWIO", "NHWC")
    forms = {
        "plain": ((3, 3, 4, 6), {"window_strides": (2, 1)}),
        "pointwise": ((1, 1, 4, 6), {}),
        "grouped": ((3, 3, 2, 6), {"feature_group_count": 2}),
        "depthwise": ((3, 3, 1, 4), {"feature_group_count": 4}),
        "two each": ((3, 3, 1, 8), {"feature_group_count": 4, "rhs_dilation": (1, 2)}),
        "transposed": ((3, 3, 4, 5), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 2))}),
    }
    params = {name: networks.images(k, shape) for k, (name, (shape, _)) in enumerate(forms.items())}

    def net(p, x):
        found = {}
        for name, (_, options) in forms.items():
            settings = {"window_strides": (1, 1), "padding": "SAME", **options}
            y = jax.lax.conv_general_dilated(x, p[name], dimension_numbers=layout, **settings)
            found[name] = jax.nn.relu(y + 0.5)
        return found

    sizes = np.array([1, 0.01, 30, 0], np.float32)[:, None, None, None]
    x = networks.images(9, (4, 6, 7, 4)) * sizes
    kinds = ("conv2d", "depthwise_conv2d", "conv2d_transpose")
    qparams, qapply = jaxquant.quant_dynamic(
        params, net, x, quantizable_op_type=kinds, progress=False
    )
    sites = {row["name"]: row["status"] for row in qapply.report().rows}
    assert {sites[name] for name in forms} == {"int8"}
    agree(tmp_path, qparams, qapply, x[1:], processors=processors, shapes="b, 6, 7, 4")


def test_a_network_of_convolutions(tmp_path):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), (2, 2))(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8)(x))
            return nn.Dense(5)(nn.Conv(12, (1, 1))(x).mean((1, 2)))

    x = networks.images(0, (6, 8, 8, 3))
    variables = Network().init(jax.random.key(0), x)
    qparams, qapply = jaxquant.quant_dynamic(variables, Network().apply, x, progress=False)
    agree(tmp_path, qparams, qapply, x[:3])
