"""ONNX's own operators for what JAX writes as several equations."""

import collections
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime
from tests.other_processors import run_python

OWN = ("Gelu", "LayerNormalization", "Softmax")


class Block(nn.Module):
    """Masked attention and two dense layers: ids [B, T] -> [B, 4]."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 8)(ids) + nn.Embed(6, 8)(jnp.arange(ids.shape[1]))
        mask = (ids > 0)[:, None, None, :]
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(2)(x, mask=mask))
        hidden = nn.gelu(nn.Dense(12)(x), approximate=False)
        x = nn.LayerNorm()(x + nn.Dense(8)(hidden))
        return nn.Dense(4)(x.mean(1))


IDS = np.asarray(np.random.default_rng(0).integers(0, 11, (5, 6)), np.int32)


def quantized(**settings):
    module = Block()
    variables = networks.random_params(lambda: module.init(jax.random.key(0), IDS))
    return jaxquant.quant_post(variables, module.apply, [IDS], progress=False, **settings)


def exported(path, model, **settings):
    """How often the file has each operator."""
    jaxquant.export_onnx(path, *model, progress=False, **settings)
    return collections.Counter(runtime.ops(runtime.onnx.load(path)))


@pytest.fixture(scope="module")
def model():
    return quantized()


def agrees(model, path, *batches):
    for ids in batches:
        (found,) = runtime.run(path, ids)
        assert runtime.sqnr(model[1](model[0], ids), found) > 45


def test_a_transformer_has_its_own_operators_and_sizes_that_vary(model, tmp_path):
    path = tmp_path / "m.onnx"
    ops = exported(path, model, shapes="b, t")
    assert [ops[name] for name in OWN] == [1, 2, 1]
    assert not ops["GlobalAveragePool"] + ops["Erf"] + ops["Exp"] + ops["Sqrt"]
    file = runtime.onnx.load(path)
    assert file.opset_import[0].version == 20
    (given,) = file.graph.input
    assert [d.dim_param for d in given.type.tensor_type.shape.dim] == ["b", "t"]
    agrees(model, path, IDS[:2], IDS[:3, :4], IDS[:1, 2:])


def test_the_tanh_form(tmp_path):
    params, x = {"w": networks.images(0, (8, 8))}, networks.images(1, (4, 8))
    model = jaxquant.quant_dynamic(params, lambda p, x: nn.gelu(x @ p["w"]), x, progress=False)
    ops = exported(tmp_path / "m.onnx", model, opset=21)
    assert ops["Gelu"] == 1
    assert not ops["Tanh"]
    (found,) = runtime.run(tmp_path / "m.onnx", x)
    assert runtime.sqnr(model[1](model[0], x), found) > 100


@pytest.mark.parametrize(("opset", "counts"), [(13, [0, 0, 1]), (17, [0, 2, 1])])
def test_older_opsets_compose_what_they_lack(model, opset, counts, tmp_path):
    ops = exported(tmp_path / "m.onnx", model, opset=opset)
    assert [ops[name] for name in OWN] == counts
    agrees(model, tmp_path / "m.onnx", IDS[:2])


def test_what_reads_int8_reads_it_dequantized(tmp_path):
    model = quantized(is_full_quantize=True)
    ops = exported(tmp_path / "m.onnx", model)
    assert ops["Softmax"] == 1
    (found,) = runtime.run(tmp_path / "m.onnx", IDS[:2])
    assert runtime.sqnr(model[1](model[0], IDS[:2]), found) > 30


def test_inside_loops(tmp_path):
    """A body in float, and the steps of an unrolled scan."""

    def net(p, x):
        def twice(_, x):
            return jax.nn.standardize(x)

        def layer(x, w):
            return x + jax.nn.gelu(x @ w), None

        x = jax.lax.fori_loop(0, x.shape[0], twice, x)
        return jax.lax.scan(layer, x, p["w"])[0]

    params, x = {"w": networks.images(0, (3, 8, 8)) / 3}, networks.images(1, (4, 8))
    model = jaxquant.quant_post(params, net, [x], progress=False)
    path = tmp_path / "m.onnx"
    assert exported(path, model, shapes="4, 8")["Gelu"] == 3
    assert "LayerNormalization" in str(runtime.onnx.load(path))
    (found,) = runtime.run(path, x)
    assert runtime.sqnr(model[1](model[0], x), found) > 45


_OPENVINO = """
import sys
import numpy as np
import openvino

folder = sys.argv[1]
settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
compiled = openvino.Core().compile_model(f"{folder}/m.onnx", "CPU", settings)
np.save(f"{folder}/y.npy", compiled([np.load(f"{folder}/x.npy")])[compiled.output(0)])
"""


def test_openvino_runs_them(model, tmp_path):
    if importlib.util.find_spec("openvino") is None:  # not imported here: it forks, JAX warns of it
        pytest.skip("openvino is not installed")
    exported(tmp_path / "m.onnx", model, shapes="b, t")
    np.save(tmp_path / "x.npy", IDS[:3, :4])
    run_python("this", tmp_path, _OPENVINO, tmp_path)
    expected = model[1](model[0], IDS[:3, :4])
    assert runtime.sqnr(expected, np.load(tmp_path / "y.npy")) > 30
