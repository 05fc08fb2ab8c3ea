"""What lies between convolutions and dots: in int8 where qapply keeps it so, else in float."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.deploy.litert.runtime import agrees
from tests.deploy.litert.test_contraction import weights
from tests.networks import images

IMAGE = (3, 8, 6, 8)
NHWC = ("NHWC", "HWIO", "NHWC")


def window_sum(y, sizes, strides, padding):
    return lax.reduce_window(y, 0.0, lax.add, (1, *sizes, 1), (1, *strides, 1), padding)


def behind_conv(functions):
    """Every function of what a convolution gives, with a dot over its last axis behind it."""

    def apply_fn(p, x):
        y = nn.relu(x @ p["first"])
        results = {name: function(y) for name, function in functions.items()}
        return {name: z @ p["last"][: z.shape[-1]] for name, z in results.items()}

    return {"first": weights(8, 8), "last": weights(16, 5)}, apply_fn


MOVES = {
    "reshape": lambda y: y.reshape(-1, 48, 8),
    "transpose": lambda y: y.transpose(0, 2, 3, 1),
    "slice": lambda y: y[:, 1:7:2, ::3],
    "reverse": lambda y: y[:, ::-1],
    "pad": lambda y: jnp.pad(y, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5),
    "cut": lambda y: lax.pad(y, 0.0, ((0, 0, 0), (-1, 2, 0), (0, 0, 0), (0, 0, 0))),
    "concatenate": lambda y: jnp.concatenate([y, 2.0 * y[..., :3]], -1),
    "stack": lambda y: jnp.stack([y, y], 1),
    "split": lambda y: jnp.concatenate(jnp.split(y, 2, -1)[::-1], -1),
    "tile": lambda y: jnp.tile(y, (1, 2, 1, 1)),
    "rows": lambda y: jnp.take(y, jnp.array([2, 0, 1]), axis=1),
}
POOLS = {
    "max, same": lambda y: nn.max_pool(y, (3, 3), (2, 2), padding="SAME"),
    "max, padded": lambda y: nn.max_pool(y, (3, 3), (2, 2), padding=((1, 1), (1, 1))),
    "average": lambda y: window_sum(y, (3, 3), (1, 1), "SAME") / 9.0,
    "average of an even number": lambda y: window_sum(y, (2, 2), (2, 2), "VALID") / 4.0,
    "average along one axis": lambda y: window_sum(y, (1, 2), (1, 2), "VALID") * 0.5,
    "mean": lambda y: y.mean((1, 2)),
    "along one axis": lambda y: nn.max_pool(y[:, 0], (2,), (2,)),
    "largest": lambda y: y.max((1, 2)),
}
ACTIVATIONS = {
    "pad between": lambda y: lax.pad(y, 0.5, ((0, 0, 0), (1, 0, 2), (-1, -1, 1), (0, 1, 0))),
    "clip": lambda y: jnp.clip(y, 0.3, 2.5),
    "swish": nn.swish,
    "tanh": nn.tanh,
    "gelu": lambda y: nn.gelu(y, approximate=False),
    "gelu, approximate": nn.gelu,
    "softmax": nn.softmax,
    "leaky relu": nn.leaky_relu,
    "normalized": lambda y: (
        (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-3)
    ),
}
SUMS = {
    "add": lambda y: y + y[:, ::-1],
    "subtract": lambda y: y - 0.5 * y[:, ::-1],
    "multiply": lambda y: y * y[:, ::-1],
    "scaled": lambda y: y * y.mean((1, 2), keepdims=True),
}


def copies(y):
    """Of the first row, five along an axis."""
    return jnp.broadcast_to(y[:, :1], (y.shape[0], 5, *y.shape[2:]))


COPIES = {
    "concatenate": lambda y: jnp.concatenate([copies(y), y], 1),
    "mean": lambda y: copies(y).mean(1),
    "average": lambda y: window_sum(copies(y), (2, 1), (1, 1), "SAME") * 0.5,
    "convolution": lambda y: lax.conv_general_dilated(
        copies(y),
        jnp.ones((3, 1, 8, 4)),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ),
    "product": lambda y: jnp.einsum("bhwc,bhwd->bwcd", copies(y), copies(y)),
    "softmax": lambda y: jax.nn.softmax(copies(y), 1),
}


@pytest.mark.parametrize("full", [False, True])
def test_copies_along_an_axis_are_all_read(full, tmp_path):
    agrees(tmp_path, *behind_conv(COPIES), images(0, IMAGE), full=full, at_least=45)


def test_moves_and_pools_hand_int8_on(tmp_path):
    found = agrees(tmp_path, *behind_conv(MOVES | POOLS), images(0, IMAGE), full=True)
    # The last dots read floats, and so does the product before the concatenation.
    assert found.count("DEQUANTIZE") == 2 * len(MOVES | POOLS) + 1
    assert found.count("QUANTIZE") == 2
    assert found.count("MEAN") == 1
    assert found.count("DEPTHWISE_CONV_2D") == sum("average" in name for name in POOLS)


def test_activations(tmp_path):
    # An integer in some thousand is another where exp and its like differ in their last bits.
    agrees(tmp_path, *behind_conv(ACTIVATIONS), images(0, IMAGE), at_least=45)


def test_sums_of_int8(tmp_path):
    found = agrees(tmp_path, *behind_conv(SUMS), images(0, IMAGE), full=True, at_least=45)
    assert {"ADD", "SUB", "MUL"} <= set(found)


def test_resizing(tmp_path):
    p = {"first": weights(8, 8), "last": weights(8, 5)}

    def apply_fn(p, x):
        y = nn.relu(x @ p["first"])
        sizes = y.shape[0], 2 * y.shape[1], 2 * y.shape[2], y.shape[3]
        return jax.image.resize(y, sizes, "bilinear") @ p["last"]

    agrees(tmp_path, p, apply_fn, images(0, (3, 3, 4, 8)))


def test_embeddings_and_several_inputs(tmp_path):
    p = {"table": weights(20, 8), "w": weights(8, 5)}

    def apply_fn(p, x):
        y = p["table"][x["ids"]] * x["mask"][..., None]
        return {"logits": y @ p["w"], "best": (y @ p["w"]).argmax(-1)}

    ids = jnp.arange(24).reshape(4, 6) % 20
    agrees(tmp_path, p, apply_fn, {"ids": ids, "mask": (ids > 3).astype(jnp.float32)})
