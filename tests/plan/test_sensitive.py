"""Which sites are kept in 8 bits where 4 are asked for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests.networks import rows

WIDTH = 48
IDS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
PARAMS = {
    "words": np.ones((600, WIDTH), np.float32),
    "kinds": np.ones((4, WIDTH), np.float32),
    "first": np.ones((WIDTH, 2), np.float32),
    "up": np.ones((2, 900), np.float32),
    "down": np.ones((900, WIDTH), np.float32),
}


def apply_fn(p: Any, ids: jax.Array) -> jax.Array:
    x = p["words"][ids] + p["kinds"][ids % 4]
    x = x @ p["first"]
    return jax.nn.relu(x @ p["up"]) @ p["down"] @ p["words"].T


def bits(**options: Any) -> dict[str, str]:
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, progress=False, **options)
    return {name: row["mode"].removesuffix(" weights") for name, row in rows(qapply).items()}


def test_the_smallest_weights_as_many_as_hold_a_twentieth():
    found = bits(weight_bits=4)
    assert {name for name, mode in found.items() if mode == "int8"} == {"kinds", "first", "up"}
    assert set(found.values()) == {"int4", "int8"}


def test_of_weights_as_small_the_last_are_kept():
    # 400 of 8400 numbers: no more than one of 20 x 20.
    params = {name: np.ones((20, 20), np.float32) for name in "abcd"}
    params["large"] = np.ones((20, 340), np.float32)

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        for name in "abcd":
            x = jax.nn.relu(x @ p[name])
        return x @ p["large"]

    x = jax.ShapeDtypeStruct((3, 20), jnp.float32)
    _, qapply = jaxquant.quant_weights(params, apply_fn, x, weight_bits=4, progress=False)
    assert [rule.pattern for rule in qapply.report().rules] == ["site:d"]


@pytest.mark.parametrize(("width", "kept"), [(5, 4), (10, 0)])
def test_layers_that_are_alike_are_kept_together(width, kept):
    params = {f"layer{n}": np.ones((width, width), np.float32) for n in range(4)}
    params["large"] = np.ones((width, 3000 // width), np.float32)

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        for n in range(4):
            x = jax.nn.relu(x @ p[f"layer{n}"])
        return x @ p["large"]

    x = jax.ShapeDtypeStruct((3, width), jnp.float32)
    _, qapply = jaxquant.quant_weights(params, apply_fn, x, weight_bits=4, progress=False)
    assert len(qapply.report().rules) == kept


def test_products_of_one_tensor_are_kept_together_or_not_at_all():
    params = {name: np.ones((20, 10), np.float32) for name in "qkv"}
    params |= {"out": np.ones((10, 30), np.float32), "large": np.ones((30, 320), np.float32)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        return (x @ p["q"] * (x @ p["k"]) + x @ p["v"]) @ p["out"] @ p["large"]

    x = jax.ShapeDtypeStruct((3, 20), jnp.float32)
    _, qapply = jaxquant.quant_weights(params, apply_fn, x, weight_bits=4, progress=False)
    assert [rule.pattern for rule in qapply.report().rules] == ["site:out"]


def test_depthwise_convolutions_are_kept_and_pointwise_ones_not():
    params = {"depthwise": np.ones((3, 3, 1, 64)), "pointwise": np.ones((1, 1, 64, 256))}
    params = {name: array.astype(np.float32) for name, array in params.items()}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x, p["depthwise"], (1, 1), "SAME", dimension_numbers=names, feature_group_count=64
        )
        return jax.lax.conv_general_dilated(x, p["pointwise"], (1, 1), "SAME",
                                            dimension_numbers=names)  # fmt: skip

    x = jax.ShapeDtypeStruct((2, 6, 6, 64), jnp.float32)
    _, qapply = jaxquant.quant_weights(params, apply_fn, x, weight_bits=4, progress=False)
    assert [rule.pattern for rule in qapply.report().rules] == ["site:depthwise"]


def test_in_a_loop_all_layers_of_a_weight_count():
    stacked = {"router": np.ones((6, 32, 4), np.float32), "up": np.ones((6, 32, 256), np.float32),
               "down": np.ones((6, 256, 32), np.float32)}  # fmt: skip

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            gate = jax.nn.sigmoid(x @ own["router"]).sum(axis=-1, keepdims=True)
            return x + gate * (jnp.tanh(jnp.sin(x) @ own["up"]) @ own["down"]), None

        return jax.lax.scan(layer, x, p)[0]

    x = jax.ShapeDtypeStruct((3, 32), jnp.float32)
    _, qapply = jaxquant.quant_weights(stacked, apply_fn, x, weight_bits=4, progress=False)
    assert [rule.pattern for rule in qapply.report().rules] == ["site:router"]


def test_rules_of_the_user_come_behind():
    found = bits(weight_bits=4, rules=(jaxquant.Rule("kinds", weight_bits=4),
                                       jaxquant.Rule("down", weight_bits=8)))  # fmt: skip
    assert {name for name, mode in found.items() if mode == "int8"} == {"first", "up", "down"}


def test_the_report_has_the_rules():
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, weight_bits=4, progress=False)
    patterns = {rule.pattern for rule in qapply.report().rules}
    assert patterns == {"site:kinds", "site:first", "site:up"}
    _, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, progress=False)
    assert qapply.report().rules == ()
