"""Which parameters are divided so that a tensor is."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import trace_model
from jaxquant.recover.folding import dividing

WIDTH = 6
X = np.random.default_rng(0).normal(size=(3, 5, WIDTH)).astype(np.float32)
NAMES = ("NHWC", "HWIO", "NHWC")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def normalized(p: Any, x: jax.Array) -> jax.Array:
    y = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True))
    return (y * p["gain"]) @ p["w"]


def linear(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ p["before"] + p["bias"]) @ p["w"]


def convolved(p: Any, x: jax.Array) -> jax.Array:
    x = x[:, :, None]
    y = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=NAMES)
    return y @ p["w"]


class Linen(nn.Module):
    """Two LayerNorms before dense layers; the second one is added to what comes behind, too."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.Dense(WIDTH, name="w")(nn.LayerNorm(name="norm")(x))
        y = nn.LayerNorm(name="other")(x)
        return y + nn.Dense(WIDTH, name="kept")(y)


def squared(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["before"]) ** 2 @ p["w"]


def twice(p: Any, x: jax.Array) -> jax.Array:
    return (x * p["gain"]) @ p["w"] + p["gain"]


def rounded(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["before"]).astype(jnp.int32).astype(jnp.float32) @ p["w"]


LINEN = Linen().init(jax.random.key(0), X)["params"]
PLAIN = {"gain": draw(WIDTH), "before": draw(WIDTH, WIDTH), "bias": draw(WIDTH),
         "w": draw(WIDTH, WIDTH), "kernel": draw(3, 1, WIDTH, WIDTH)}  # fmt: skip
CASES = {
    "norm": (normalized, PLAIN, "w", {"gain"}),
    "linear": (linear, PLAIN, "w", {"before", "bias"}),
    "convolution": (convolved, PLAIN, "w", {"kernel"}),
    "layer norm": (lambda p, x: Linen().apply({"params": p}, x), LINEN, "w",
                   {"norm/scale", "norm/bias"}),
    "read by others": (lambda p, x: Linen().apply({"params": p}, x), LINEN, "kept", None),
    "no line": (squared, PLAIN, "w", None),
    "integers between": (rounded, PLAIN, "w", None),
    "a parameter of others": (twice, PLAIN, "w", None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_dividing_them_divides_the_tensor(case):
    apply_fn, params, name, wanted = case
    model = trace_model(apply_fn, params, (X,))
    site = next(site for site in model.sites if site.name == name)
    axis = site.input_axes.contracted[0]
    found = dividing(model, site.operands[0], axis, [site.equation])
    if wanted is None:
        assert found is None
        return
    assert found is not None
    assert {model.graph.paths[place.leaf] for place in found} == wanted

    # What is divided here and multiplied there gives the same.
    factors = np.float32(2.0) ** np.arange(-2, WIDTH - 2)
    leaves = dict(zip(model.graph.leaves, jax.tree.leaves(params), strict=True))
    for place in found:
        shape = [WIDTH if a == place.axis else 1 for a in range(leaves[place.leaf].ndim)]
        leaves[place.leaf] = leaves[place.leaf] / factors.reshape(shape)
    changed = jax.tree.unflatten(jax.tree.structure(params), list(leaves.values()))
    weight = changed[name]["kernel"] if isinstance(changed[name], dict) else changed[name]
    back = weight * factors[:, None]
    changed = changed | {name: {**changed[name], "kernel": back} if weight is not changed[name]
                         else back}  # fmt: skip
    np.testing.assert_allclose(apply_fn(changed, X), apply_fn(params, X), rtol=1e-5, atol=1e-5)
