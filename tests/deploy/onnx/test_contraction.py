"""Convolutions and dots in ONNX Runtime against qapply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import agrees, ops, run, sqnr, weights
from tests.networks import images, quantize

IMAGE = (3, 8, 8, 4)
BOTH = pytest.mark.parametrize("full", [False, True])


def conv_net(p, x, strides=(1, 1), padding="SAME", **options):
    dimension_numbers = options.pop("dimension_numbers", ("NHWC", "HWIO", "NHWC"))
    y = lax.conv_general_dilated(
        x, p["w"], strides, padding, dimension_numbers=dimension_numbers, **options
    )
    return y + p["b"] if "b" in p else y


CONVS = {
    "same": ((3, 3, 4, 6), {}),
    "strided": ((3, 3, 4, 6), {"strides": (2, 2)}),
    "uneven": ((3, 3, 4, 6), {"strides": (2, 1), "padding": ((0, 1), (2, 0))}),
    "dilated": ((3, 3, 4, 6), {"rhs_dilation": (2, 1)}),
    "grouped": ((3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((3, 3, 1, 4), {"feature_group_count": 4}),
    "depthwise, two each": ((5, 5, 1, 8), {"feature_group_count": 4}),
    "pointwise": ((1, 1, 4, 6), {}),
    "transposed": ((3, 3, 4, 6), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 2))}),
    "transposed, wide": ((2, 2, 4, 6), {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 1))}),
    "other layouts": (
        (6, 3, 3, 4),
        {"dimension_numbers": ("NHWC", "OHWI", "NCHW"), "padding": "VALID"},
    ),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name, tmp_path):
    shape, options = CONVS[name]
    params = {"w": weights(*shape), "b": weights(1 if "OHWI" in str(options) else shape[-1])}
    full = name.startswith("transposed")  # a kind of its own, which the default leaves out
    function = lambda p, x: conv_net(p, x, **options)  # noqa: E731
    model = agrees(
        tmp_path, params, function, images(0, IMAGE), full=full, at_least=60, processors="vnni"
    )
    assert ops(model).count("QuantizeLinear") == 1
    int8 = [t for t in model.graph.initializer if t.data_type == 3 and t.dims]
    assert any(int(np.prod(t.dims)) == params["w"].size for t in int8)


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_along_other_numbers_of_axes(rank, tmp_path):
    params = {"w": weights(*(3,) * rank, 4, 6)}
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
    agrees(
        tmp_path,
        params,
        lambda p, x: conv_net(p, x, (2,) * rank, dimension_numbers=numbers),
        images(0, (3, *(6,) * rank, 4)),
    )


def test_convolutions_that_stay_float(tmp_path):
    def apply_fn(p, x):
        with jax.named_scope("skip_quant"):
            x = conv_net({"w": p["w"]}, x)
            x = conv_net({"w": p["t"]}, x, lhs_dilation=(2, 2), padding=((1, 1), (1, 1)))
            x = x.mean((1, 2)) @ p["d"]
        return x @ p["e"]

    params = {"w": weights(3, 3, 4, 6), "t": weights(3, 3, 6, 5)}
    params |= {"d": weights(5, 7), "e": weights(7, 3)}
    agrees(tmp_path, params, apply_fn, images(0, IMAGE))


def test_transposed_convolutions_whose_kernel_is_computed(tmp_path):
    """A kernel of parameters that is normalised, and one of the inputs."""

    def transposed(x, kernel):
        return lax.conv_transpose(x, kernel, (2, 2), "SAME")

    def apply_fn(p, x):
        norm = jnp.sqrt(1e-6 + (p["k"] ** 2).sum((0, 1, 2)))
        factor = jnp.tanh((x @ p["w"]).mean((0, 1, 2)))
        return transposed(x, p["k"] / norm), transposed(x, p["k"] * factor)

    params = {"w": weights(4, 5), "k": images(1, (3, 3, 4, 5))}
    qparams, qapply = quantize(params, apply_fn, images(0, IMAGE))
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply)
    expected = qapply(qparams, images(0, IMAGE))
    for a, b in zip(expected, run(tmp_path / "m.onnx", images(0, IMAGE)), strict=True):
        assert sqnr(a, b) > 60


def test_a_batchnorm_with_negative_and_zero_scales(tmp_path):
    params = {"w": weights(3, 3, 4, 6), "b": weights(6)}
    params["scale"] = jnp.array([1.0, -2.0, 0.0, 1e-3, -1e-12, 5.0])

    def apply_fn(p, x):
        return conv_net({"w": p["w"]}, x) * p["scale"] + p["b"]

    agrees(tmp_path, params, apply_fn, images(0, IMAGE), at_least=60)


DOTS = {
    "dense": ((5,), lambda p, x: x[:, 0, 0] @ p),
    "dense on axes": ((5,), lambda p, x: x @ p),
    "weight first": ((5,), lambda p, x: lax.dot_general(p, x, (((0,), (3,)), ((), ())))),
    "two free axes": ((2, 3), lambda p, x: jnp.tensordot(x, p, 1)),
    "two contracted": ((5,), lambda p, x: jnp.einsum("bhwc,wco->bho", x, jnp.stack([p] * 8))),
    "batched weight": ((8, 5), lambda p, x: jnp.einsum("bhwc,cho->bhwo", x, p)),
}


@pytest.mark.parametrize("name", DOTS)
def test_dots(name, tmp_path):
    shape, function = DOTS[name]
    agrees(tmp_path, weights(4, *shape), function, images(0, IMAGE), at_least=60)


def test_the_parts_of_a_first_factor_have_its_type(tmp_path):
    """As of keys with rotary positions: each part has an entry of its own, like the whole's."""

    def apply_fn(p, x):
        first, second = jnp.split(x @ p, 2, axis=-1)
        turned = jnp.concatenate([first - second, first + second], axis=-1)
        return turned @ x.swapaxes(1, 2)

    agrees(tmp_path, weights(8, 8), apply_fn, images(0, (3, 6, 8)), full=True)


@BOTH
def test_attention(full, tmp_path):
    def apply_fn(p, x):
        q, k, v = (jnp.einsum("btc,chd->bthd", x, p[name]) for name in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        return jnp.einsum("bqhd,hdc->bqc", mixed, p["o"])

    params = {name: weights(8, 2, 4, seed=ord(name)) for name in "qkv"} | {"o": weights(2, 4, 8)}
    agrees(tmp_path, params, apply_fn, images(0, (3, 6, 8)), full=full, at_least=35)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
def test_equalized_tensors(runtime, full, tmp_path):
    """A convolution, a depthwise one that is added to its input, and a dot read such tensors."""
    uneven = np.logspace(-2, 0, 8).astype(np.float32)
    params = {
        "first": weights(1, 1, 3, 8) * uneven,
        "second": weights(3, 3, 1, 8, seed=8),
        "last": weights(8, 4, seed=9) / uneven[:, None],
    }

    def conv(x, w, groups=1):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    def apply_fn(p, x):
        y = jax.nn.relu6(conv(x, p["first"]))
        y = jax.nn.relu(conv(y, p["second"], groups=8) + y)
        return y @ p["last"]

    x = images(0, (16, 6, 6, 3))
    qparams, qapply = jaxquant.quant_post(
        params, apply_fn, [x], algo="abs_max", recover=("equalization",), is_full_quantize=full,
        progress=False,
    )  # fmt: skip
    assert sum(bool(tensor.channels) for tensor in qapply.plan.tensors) >= 2
    path = tmp_path / "model.onnx"
    jaxquant.export_onnx(path, qparams, qapply, runtime=runtime)
    assert sqnr(qapply(qparams, x[:2]), run(path, x[:2])[0]) > 45
