"""Every operation between convolutions and dots that the export covers, against qapply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.deploy.onnx.runtime import agrees, behind_dot, weights
from tests.networks import images, whole_numbers

IMAGE = (3, 8, 8, 4)
BOTH = pytest.mark.parametrize("full", [False, True])


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
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=layout)
        y = jax.nn.relu(y).sum((1, 2), keepdims=True)
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
