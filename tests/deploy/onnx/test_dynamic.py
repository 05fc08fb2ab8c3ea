"""ONNX files of dots whose operands get their scales in each call."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime
from tests.run.test_dynamic import CHAIN, DOTS, ROWS, shapes


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


def test_dynamic_convolutions_are_named(tmp_path):
    layout = ("NHWC", "HWIO", "NHWC")

    def net(p, x):
        return jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=layout)

    params, x = {"k": networks.images(0, (3, 3, 2, 4))}, networks.images(1, (2, 5, 5, 2))
    qparams, qapply = jaxquant.quant_dynamic(params, net, x, progress=False)
    with pytest.raises(ValueError, match=r"scales its operands in each call.*site 'k'"):
        jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply)
