"""Convolutions and dots as int8 kernels of LiteRT, against qapply."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.deploy.litert.runtime import agrees
from tests.networks import images

IMAGE = (4, 8, 8, 4)
CONVS = {
    "same": ((3, 3, 4, 6), {}),
    "strided": ((3, 3, 4, 6), {"strides": (2, 2)}),
    "uneven": ((3, 3, 4, 6), {"strides": (2, 1), "padding": ((0, 1), (2, 0))}),
    "dilated": ((3, 3, 4, 6), {"rhs_dilation": (2, 1)}),
    "grouped": ((3, 3, 2, 6), {"feature_group_count": 2}),
    "pointwise": ((1, 1, 4, 6), {"strides": (2, 1)}),
}
DEPTHWISE = {
    "one each": ((3, 3, 1, 4), {"feature_group_count": 4}),
    "two each": ((5, 5, 1, 8), {"feature_group_count": 4, "strides": (2, 2)}),
}
TRANSPOSED = {
    "cut": ((3, 3, 4, 6), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 2))}),
    "wide": ((2, 2, 4, 6), {"lhs_dilation": (2, 2), "padding": ((1, 2), (1, 1))}),
    "whole": ((3, 3, 4, 6), {"lhs_dilation": (2, 3), "padding": ((2, 2), (2, 2))}),
}


def weights(*shape, seed=7):
    return images(seed, shape) * 0.4


def with_last(firsts, p, x):
    """Parameters and a function: a ReLU and a dot behind each operation, which reads it in int8."""
    p = dict(p)
    for name, first in firsts.items():
        width = int(np.prod(jax.eval_shape(first, p, x).shape[1:]))
        p[f"last {name}"] = weights(width, 5) / np.sqrt(width)

    def apply_fn(p, x):
        results = {name: jax.nn.relu(first(p, x)) for name, first in firsts.items()}
        return {name: y.reshape(y.shape[0], -1) @ p[f"last {name}"] for name, y in results.items()}

    return p, apply_fn


def convolutions(forms, numbers=("NHWC", "HWIO", "NHWC")):
    """The parameters and functions of convolutions with a bias."""
    p, firsts = {}, {}
    for name, (shape, given) in forms.items():
        options = {"window_strides": (1,) * (len(shape) - 2), "padding": "SAME", **given}
        if "strides" in options:
            options["window_strides"] = options.pop("strides")
        p[name], p[f"bias {name}"] = weights(*shape), weights(shape[-1])

        def first(p, x, name=name, options=options):
            y = lax.conv_general_dilated(x, p[name], dimension_numbers=numbers, **options)
            return y + p[f"bias {name}"]

        firsts[name] = first
    return p, firsts


@pytest.mark.parametrize(
    ("op", "forms"),
    [("CONV_2D", CONVS), ("DEPTHWISE_CONV_2D", DEPTHWISE), ("TRANSPOSE_CONV", TRANSPOSED)],
)
def test_convolutions(op, forms, tmp_path):
    x = images(0, IMAGE)
    p, firsts = convolutions(forms)
    found = agrees(tmp_path, *with_last(firsts, p, x), x, full=op == "TRANSPOSE_CONV")
    assert found.count(op) == len(forms)
    assert found.count("QUANTIZE") == 1  # from then on int8, up to the last dots


def test_a_convolution_along_one_axis(tmp_path):
    x = images(0, (4, 16, 4))
    forms = {"strided": ((3, 4, 8), {"strides": (2,)})}
    p, firsts = convolutions(forms, ("NWC", "WIO", "NWC"))
    assert "CONV_2D" in agrees(tmp_path, *with_last(firsts, p, x), x)


def test_channels_that_come_first_are_turned_once(tmp_path):
    x, p = images(0, (4, 3, 8, 8)), {"a": weights(6, 3, 3, 3), "b": weights(5, 6, 3, 3)}

    def apply_fn(p, x):
        layer = lambda x, w: lax.conv(x, w, (1, 1), "SAME")  # noqa: E731
        return layer(jax.nn.relu(layer(x, p["a"])), p["b"])

    assert agrees(tmp_path, p, apply_fn, x).count("TRANSPOSE") == 2


def test_dots_with_a_weight(tmp_path):
    x = images(0, (4, 5, 16))
    p = {
        "rows": weights(16, 6),
        "heads": weights(16, 2, 4),
        "joined heads": weights(2, 4, 6),
        "first": weights(6, 16),
    }
    heads = lambda p, x: jnp.einsum("btk,khn->bthn", x, p["heads"])  # noqa: E731
    firsts = {
        "rows": lambda p, x: x @ p["rows"],
        "heads": heads,
        "joined heads": lambda p, x: jnp.einsum("bthn,hnk->btk", heads(p, x), p["joined heads"]),
        "first": lambda p, x: jnp.einsum("nk,bk->nb", p["first"], x[:, 0]).T,
    }
    found = agrees(tmp_path, *with_last(firsts, p, x), x, full=True)
    assert found.count("FULLY_CONNECTED") == 9


def test_products_of_two_activations(tmp_path):
    x = images(0, (4, 8, 16))
    p = {"q": weights(16, 8), "k": weights(16, 8), "last": weights(8, 3)}

    def apply_fn(p, x):
        q, k = x @ p["q"], x @ p["k"]
        scores = jnp.einsum("bqd,bkd->bqk", q, k)
        return scores @ p["last"], jnp.einsum("bqk,bkd->bqd", scores, k) @ p["last"]

    # The runtime's own int8 kernel rounds by a multiplier of 31 bits.
    found = agrees(tmp_path, p, apply_fn, x, full=True, at_least=45)
    assert found.count("BATCH_MATMUL") == 2
