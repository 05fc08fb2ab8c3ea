"""Every operation that the export covers, in ONNX Runtime against qapply."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import agrees, behind_dot, ops, run, sqnr, weights
from tests.networks import images, quantize, whole_numbers

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


def pool(x, start, function, window, strides, padding="VALID"):
    return lax.reduce_window(x, start, function, (1, *window, 1), (1, *strides, 1), padding)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 0.7),
    "leaky_relu": jax.nn.leaky_relu,
    "hard_swish": jax.nn.hard_swish,
    "swish": jax.nn.swish,
    "gelu": jax.nn.gelu,
    "gelu, exact": lambda x: jax.nn.gelu(x, approximate=False),
    "elu": jax.nn.elu,
    "tanh": jnp.tanh,
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "layer norm": lambda x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(1 + x.var(-1, keepdims=True))
    ),
}
POOLS = {
    "max": lambda x: pool(x, -jnp.inf, lax.max, (2, 3), (2, 2)),
    "max over the edge": lambda x: pool(
        x, -jnp.inf, lax.max, (3, 3), (2, 2), ((0, 0), (0, 1), (1, 1), (0, 0))
    ),
    "min": lambda x: pool(x, jnp.inf, lax.min, (2, 2), (2, 2)),
    "average": lambda x: pool(x, 0.0, lax.add, (3, 3), (2, 2), "SAME") / 9,
    "global average": lambda x: x.mean((1, 2)),
    "global maximum": lambda x: x.max((1, 2)),
    "mean of one axis": lambda x: x.mean(1),
    "sum kept": lambda x: x + x.sum(2, keepdims=True),
}
ARITHMETIC = {
    "add": lambda x: x + x[:, ::-1],
    "sub, mul, div": lambda x: (x - 1.0) * x[:, ::-1] / (2.0 + jnp.abs(x)),
    "where": lambda x: jnp.where(x > 0.1, x, -x),
    "broadcast": lambda x: x * jnp.broadcast_to(x[:, :1], x.shape),
    "pow, sqrt, log": lambda x: jnp.sqrt(jnp.abs(x) + 1) + jnp.log1p(x**2) + jnp.abs(x) ** 1.5,
    "exp, erf, sin, cos": lambda x: jnp.exp(-x) + lax.erf(x) + jnp.sin(x) * jnp.cos(x),
    "cumsum": lambda x: jnp.cumsum(x, 1),
    "associative scan": lambda x: lax.associative_scan(jnp.add, x, axis=1),
}
SHAPES = {
    "concatenate": lambda x: jnp.concatenate([x, jax.nn.relu(x)], 3)[..., ::2],
    "concatenate rows": lambda x: jnp.concatenate([x, x * 0.5, x[:, :1]], 1),
    "concatenate copies": lambda x: jnp.concatenate(
        [jnp.broadcast_to(x[:, :1], (x.shape[0], 3, *x.shape[2:])), x, jnp.ones(x.shape)], 1
    ),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0))),
    "pad less": lambda x: lax.pad(x, 0.5, ((0, 0, 0), (-1, 1, 0), (0, -2, 0), (0, 0, 0))),
    "pad between": lambda x: lax.pad(x, 0.5, ((0, 0, 0), (1, 0, 2), (-1, -1, 1), (0, 1, 0))),
    "reshape": lambda x: x.reshape(x.shape[0], 4, 16, x.shape[-1]),
    "flatten": lambda x: x.reshape(x.shape[0], -1)[:, :6],
    "transpose": lambda x: x.transpose(0, 2, 1, 3),
    "channels to rows": lambda x: x.transpose(0, 3, 1, 2)[..., :6],
    "slice": lambda x: x[:, 1:7:2, ::3, :5],
    "index": lambda x: x[:, 2, ::-1],
    "split": lambda x: jnp.split(x, [2, 4], axis=1)[1],
    "bilinear": lambda x: jax.image.resize(x, (x.shape[0], 6, 12, x.shape[-1]), "bilinear"),
}
GROUPS = {
    "activations": ACTIVATIONS,
    "pools": POOLS,
    "arithmetic": ARITHMETIC,
    "shapes": SHAPES,
}


@BOTH
@pytest.mark.parametrize("group", GROUPS)
def test_operations_between_dots(group, full, tmp_path):
    params = {"a": weights(4, 6), "b": weights(12, 5)}
    agrees(tmp_path, params, behind_dot(GROUPS[group]), images(0, IMAGE), full=full, at_least=33)


TRUTHS = {
    "argmax": lambda x: jnp.argmax(x, -1),
    "argmin of an axis": lambda x: jnp.argmin(x, 1),
    "comparisons": lambda x: (x > 0) & ~(x[:, ::-1] <= 0.5) | (x == 0.25),
    "counts": lambda x: (x > 0).astype(jnp.int32).sum((1, 2)),
    "round away": lambda x: lax.round(x / 4, lax.RoundingMethod.AWAY_FROM_ZERO),
    "divided whole numbers": lambda x: lax.div(x.astype(jnp.int32), 7) + (x // 8).astype(jnp.int32),
    "round, floor, sign": lambda x: jnp.round(x / 4) + jnp.floor(x) + jnp.sign(x) + jnp.ceil(x),
}


def test_whole_numbers_and_truth_values(tmp_path):
    """On whole numbers that int8 holds exactly, no result may differ at all."""
    x = whole_numbers((3, 5, 4))
    params = {"a": 127 * jnp.eye(4)}
    agrees(tmp_path, params, behind_dot(TRUTHS, False), x, at_least=np.inf)


def test_embeddings(tmp_path):
    params = {"table": weights(11, 6), "w": weights(6, 5)}
    tokens = jnp.asarray(np.arange(12).reshape(3, 4) % 11)
    agrees(tmp_path, params, lambda p, t: jnp.take(p["table"], t, axis=0) @ p["w"], tokens)


def test_several_inputs_and_outputs_with_names(tmp_path):
    params = {"w": weights(4, 3)}

    def apply_fn(p, x, more):
        y = (x + more["shift"]) @ p["w"]
        return {"y": y, "more": (jax.nn.relu(y), more["count"])}

    inputs = images(0, (3, 4)), {"shift": images(1, (3, 4)), "count": jnp.arange(3)}
    model = agrees(tmp_path, params, apply_fn, *inputs)
    names = [i.name for i in model.graph.input]
    assert names == ["input/0", "input/1/count", "input/1/shift"]
    assert [o.name for o in model.graph.output] == ["output/more/0", "output/more/1", "output/y"]


def test_bfloat16_models_compute_in_float32(tmp_path):
    params = {"w": weights(4, 6).astype(jnp.bfloat16), "b": weights(6).astype(jnp.bfloat16)}

    def apply_fn(p, x):
        return jax.nn.relu(x.astype(jnp.bfloat16) @ p["w"] + p["b"]).astype(jnp.float32)

    agrees(tmp_path, params, apply_fn, images(0, (3, 4)))


def test_several_sizes_that_vary(tmp_path):
    def apply_fn(p, x):
        y = jax.nn.relu(conv_net(p, x)).sum((1, 2), keepdims=True)
        return x + jnp.broadcast_to(y, x.shape)

    params = {"w": weights(3, 3, 4, 4)}
    agrees(tmp_path, params, apply_fn, images(0, IMAGE), shapes="b, h, w, 4")


def test_a_split_into_sizes_that_vary(tmp_path):
    """Which `odeint` makes of a state that it has flattened."""

    def apply_fn(p, x):
        flat = jnp.concatenate([(x @ p["w"]).ravel(), jnp.arange(3.0)])
        y, rest = lax.split(flat, (x.shape[0] * 6, 3))
        return y.reshape(-1, 6) * rest.sum()

    agrees(tmp_path, {"w": weights(4, 6)}, apply_fn, images(0, (3, 4)))


def test_truth_values_and_small_integers_are_reduced_and_compared(tmp_path):
    """Which ONNX's operators do not take."""

    def apply_fn(p, x):
        x = x @ p["w"]
        truths, numbers = x > 0.5, jnp.round(abs(x) * 4).astype(jnp.uint8)
        flipped = truths[..., ::-1]
        return {
            "x": x,
            "first": jnp.argmax(truths, -1) + jnp.argmin(numbers, -1),
            "some": lax.reduce_max(truths, [1]) & lax.reduce_min(truths, [2]).any(1, keepdims=True),
            "order": (truths < flipped)
            | (jnp.maximum(truths, flipped) > jnp.minimum(truths, truths)),
            "sum": numbers.sum(-1),
            "mixed": lax.dot_general(x, numbers.astype(jnp.int32), (([1], [1]), ([0], [0]))),
        }

    agrees(tmp_path, {"w": weights(4, 4)}, apply_fn, images(0, (3, 5, 4)))


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: lax.lgamma(x), "'lgamma'"),
        (lambda x: lax.cumlogsumexp(x, 1), "'cumlogsumexp'"),
    ],
)
def test_an_operation_that_is_not_covered_is_named_with_its_scope(function, named, tmp_path):
    params = {"w": weights(4, 4)}

    def apply_fn(p, x):
        with jax.named_scope("block7"):
            x = function(x)
        return x @ p["w"]

    qparams, qapply = quantize(params, apply_fn, images(0, (3, 5, 4)))
    with pytest.raises(ValueError, match=rf"does not cover .*{named}.*block7"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply)
    assert not (tmp_path / "m.onnx").exists()


def _unknown(x):
    return lax.digamma(x + 20)  # this line is in the error


def test_without_scopes_an_error_names_line_and_site(tmp_path):
    """In a plain function nothing has a name but its parameters."""

    def apply_fn(p, x):
        return _unknown(jax.nn.relu(x @ p["first"])) @ p["last"]

    params = {"first": weights(4, 6), "last": weights(6, 4)}
    qparams, qapply = quantize(params, apply_fn, images(0, (3, 4)))
    lines = inspect.getsourcelines(_unknown)
    where = f"test_operations.py:{lines[1] + 1}, behind site 'first'"
    with pytest.raises(ValueError, match=rf"'digamma'.*{re.escape(where)}"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply)
    path = tmp_path / "model"
    jaxquant.save_quantized_model(path, qparams, qapply)
    with pytest.raises(ValueError, match=r"'digamma'.*behind site 'first'"):
        jaxquant.export_onnx(tmp_path / "m.onnx", *jaxquant.load_quantized_model(path))


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_opsets(opset, tmp_path):
    def apply_fn(p, x):
        return (x @ p).max(1).sum(1)

    model = agrees(tmp_path, weights(4, 6), apply_fn, images(0, IMAGE), opset=opset)
    assert model.opset_import[0].version == opset


def test_an_opset_out_of_range_is_an_error(tmp_path):
    qparams, qapply = quantize(weights(4, 6), lambda p, x: x @ p, images(0, IMAGE))
    with pytest.raises(ValueError, match="opset=12: 13 to 23"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, opset=12)


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
