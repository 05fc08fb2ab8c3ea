"""Convolutions of one sample under `vmap`, as Equinox has them, run as those of a batch do."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import networks
from tests.native.cases import needs_kernels
from tests.plan import full

pytestmark = [needs_kernels, pytest.mark.optimized]

LAYOUTS = {1: ("NCH", "OIH", "NCH"), 2: ("NCHW", "OIHW", "NCHW")}


def make_params(axes: int) -> dict[str, jax.Array]:
    window = (3,) * axes
    shapes = {"first": (8, 3, *window), "depthwise": (8, 1, *window), "last": (8, 8) + (1,) * axes}
    params = {name: networks.images(k, shape) for k, (name, shape) in enumerate(shapes.items())}
    return {**params, "bias": networks.images(5, (8,)), "head": networks.images(6, (8, 4))}


def network(p: Any, x: jax.Array) -> jax.Array:
    """Images [N, C, *spatial]: strided, depthwise, pointwise with an addition."""
    axes = x.ndim - 2
    bias = p["bias"].reshape(-1, *(1,) * axes)

    def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
        groups = x.shape[1] // kernel.shape[1]
        return lax.conv_general_dilated(
            x, kernel, (stride,) * axes, "SAME",
            dimension_numbers=LAYOUTS[axes], feature_group_count=groups,
        )  # fmt: skip

    y = jax.nn.relu(conv(x, p["first"], 2) + bias)
    y = jax.nn.relu(y + (conv(jax.nn.relu(conv(y, p["depthwise"]) + bias), p["last"]) + bias))
    return y.mean(tuple(range(2, x.ndim))) @ p["head"]


def mapped(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda image: network(p, image[None])[0])(x)


def mapped_within(p: Any, x: jax.Array) -> jax.Array:
    """Each convolution has a batch of one, and gives it up, as `equinox.nn.Conv` does."""

    def one(image: jax.Array) -> jax.Array:
        axes = image.ndim - 1
        bias = p["bias"].reshape(-1, *(1,) * axes)

        def conv(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
            groups = x.shape[0] // kernel.shape[1]
            y = lax.conv_general_dilated(
                x[None], kernel, (stride,) * axes, "SAME",
                dimension_numbers=LAYOUTS[axes], feature_group_count=groups,
            )  # fmt: skip
            return jnp.squeeze(y, 0) + bias

        y = jax.nn.relu(conv(image, p["first"], 2))
        y = jax.nn.relu(y + conv(jax.nn.relu(conv(y, p["depthwise"])), p["last"]))
        return y.mean(tuple(range(1, image.ndim))) @ p["head"]

    return jax.vmap(one)(x)


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("form", [mapped, mapped_within])
@pytest.mark.parametrize("is_full", [False, True])
def test_they_run_natively_with_the_integers_of_a_batch(axes: int, form: Any, is_full: bool):
    params, x = make_params(axes), networks.images(9, (4, 3, 65) if axes == 1 else (4, 3, 9, 9))

    def quantize(apply_fn: Any) -> Any:
        if is_full:
            model = full.quantize(apply_fn, params, x)
            return model.qparams, model.qapply
        return networks.quantize(params, apply_fn, x)

    qparams, qapply = quantize(form)
    text = jax.jit(qapply).lower(qparams, x).as_text()
    assert "custom_call @jaxquant_" in text
    assert "stablehlo.convolution" not in text

    want = qapply.with_backend("xla")(qparams, x)
    np.testing.assert_array_equal(qapply(qparams, x), want)
    np.testing.assert_array_equal(qapply(qparams, x[:3]), want[:3])
    np.testing.assert_array_equal(qapply(qapply.prepare(qparams, x), x), want)

    of_batch = quantize(network)
    np.testing.assert_array_equal(of_batch[1](of_batch[0], x), want)
