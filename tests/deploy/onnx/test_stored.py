"""ONNX files of models whose weights alone are integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime
from tests.deploy.onnx.test_operators import IDS, Block

FORMS = {
    "8 bits": {},
    "8 bits in groups": {"group_size": 3},
    "4 bits": {"weight_bits": 4},
    "4 bits in groups": {"weight_bits": 4, "group_size": 5},
}
# ONNX Runtime rounds what meets such a weight to int8, unless it is told not to.
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}


def exported(path, model, **settings):
    jaxquant.export_onnx(path, *model, progress=False, **settings)
    return runtime.onnx.load(path)


def agrees(path, model, *inputs):
    for x in inputs:
        found = runtime.run(path, x, **EXACT)
        for ours, theirs in zip(jax.tree.leaves(model[1](model[0], x)), found, strict=True):
            assert theirs.shape == ours.shape
            assert runtime.sqnr(ours, theirs) > 100


WAYS = [("8 bits", "any"), ("4 bits in groups", "any"), ("4 bits", "onnxruntime")]
SOME_WAYS = [WAYS[0], pytest.param(*WAYS[1], marks=pytest.mark.slow), WAYS[2]]


@pytest.mark.parametrize(("form", "target"), SOME_WAYS)
def test_a_transformer(form, target, tmp_path):
    module = Block()
    variables = networks.random_params(lambda: module.init(jax.random.key(0), IDS))
    model = jaxquant.quant_weights(variables, module.apply, IDS, progress=False, **FORMS[form])
    path = tmp_path / "m.onnx"
    file = exported(path, model, shapes="b, t", runtime=target)
    agrees(path, model, IDS[:2], IDS[:3, :4])
    assert file.opset_import[0].version == (20 if form == "8 bits" else 21)
    has_its_blocks = target == "onnxruntime" and "group_size" not in FORMS[form]
    assert runtime.ops(file).count("MatMulNBits") == (7 if has_its_blocks else 0)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_onnx_runtime(bits, tmp_path):
    """The last block of a row is not full."""
    params, x = {"w": networks.images(0, (40, 5))}, networks.images(1, (4, 40))
    model = jaxquant.quant_weights(
        params, lambda p, x: x @ p["w"], x, weight_bits=bits, group_size=16, progress=False
    )
    file = exported(tmp_path / "m.onnx", model, runtime="onnxruntime")
    assert "MatMulNBits" in runtime.ops(file)
    agrees(tmp_path / "m.onnx", model, x, x[:1])


class Convolutions(nn.Module):
    """One of each kind of convolution."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2))(x))
        x = nn.relu(nn.Conv(12, (3, 3), feature_group_count=6)(x))
        x = nn.ConvTranspose(4, (3, 3), (2, 2))(x)
        return nn.Dense(3)(nn.Conv(8, (1, 1))(x).mean((1, 2)))


@pytest.mark.parametrize("form", ["8 bits", "8 bits in groups"])
def test_convolutions(form, tmp_path):
    x = networks.images(0, (3, 8, 8, 4))
    variables = networks.random_params(lambda: Convolutions().init(jax.random.key(0), x))
    apply_fn = Convolutions().apply
    model = jaxquant.quant_weights(variables, apply_fn, x, progress=False, **FORMS[form])
    exported(tmp_path / "m.onnx", model)
    agrees(tmp_path / "m.onnx", model, x, x[:1])


DOTS = {
    "weight first": ((5, 4), "btk,nk->nbt"),
    "heads": ((4, 2, 3), "btk,khd->bthd"),
    "two summed": ((3, 5, 4), "btk,tnk->bn"),
    "two summed, apart": ((3, 5, 4), "btk,tnk->nb"),
    "batched": ((3, 4, 5), "btk,tkn->btn"),
}


@pytest.mark.parametrize(("form", "target"), [*WAYS, ("8 bits", "onnxruntime")])
def test_dots(form, target, tmp_path):
    params = {name: networks.images(k, shape) for k, (name, (shape, _)) in enumerate(DOTS.items())}
    x = networks.images(9, (4, 3, 4))

    def net(p, x):
        found = {name: jnp.einsum(equation, x, p[name]) for name, (_, equation) in DOTS.items()}
        return found | {"left": jax.lax.dot_general(p["heads"], x, (((0,), (2,)), ((), ())))}

    model = jaxquant.quant_weights(params, net, x, progress=False, **FORMS[form])
    exported(tmp_path / "m.onnx", model, runtime=target)
    agrees(tmp_path / "m.onnx", model, x, x[:1])


@pytest.mark.parametrize("form", ["8 bits", "4 bits in groups"])
def test_weights_that_are_read_in_float_too(form, tmp_path):
    """By a penalty, and by what normalizes the weight's columns."""

    def net(p, x):
        y = x @ p["w"] + x @ (p["v"] * 2.0)
        return y / jnp.linalg.norm(p["w"], axis=0), jnp.square(p["v"]).sum()

    params = {"w": networks.images(0, (6, 5)), "v": networks.images(1, (6, 5))}
    x = networks.images(2, (4, 6))
    model = jaxquant.quant_weights(params, net, x, progress=False, **FORMS[form])
    exported(tmp_path / "m.onnx", model)
    agrees(tmp_path / "m.onnx", model, x, x[:1])


@pytest.mark.parametrize(("form", "target"), WAYS)
def test_loops(form, target, tmp_path):
    """A scan over stacked weights is unrolled; another loop reads its weight in its body."""

    def net(p, x):
        x = jax.lax.scan(lambda x, w: (x + jnp.tanh(x) @ w, None), x, p["w"])[0]
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["v"]), x)

    params = {"w": networks.images(0, (3, 6, 6)) / 3, "v": networks.images(1, (6, 6)) / 3}
    x = networks.images(2, (4, 6))
    model = jaxquant.quant_weights(params, net, x, progress=False, **FORMS[form])
    exported(tmp_path / "m.onnx", model, runtime=target)
    agrees(tmp_path / "m.onnx", model, x, x[:1])


def test_an_opset_without_blocks_is_named(tmp_path):
    params, x = {"w": networks.images(0, (6, 5))}, networks.images(1, (4, 6))
    model = jaxquant.quant_weights(
        params, lambda p, x: x @ p["w"], x, weight_bits=4, progress=False
    )
    with pytest.raises(ValueError, match="weights of 4 bits before opset 21"):
        exported(tmp_path / "m.onnx", model, opset=17)
