"""Which operations of several equations are found in a graph, and which of them inside others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import operators, trace
from tests import networks

X = networks.images(0, (3, 5, 8))
# "shares" are a softmax from its exponential on, for who has no form of all of it.
KINDS = [kind for kind in operators.FINDERS if kind not in ("shares", "few_rows")]


def found(function, params=None):
    graph = trace.trace(function, params or {}, (X,))
    return list(operators.find_operators(graph, KINDS).values())


def test_the_largest_of_two_is_one():
    module = nn.LayerNorm()
    (norm,) = found(module.apply, module.init(jax.random.key(0), X))
    assert norm.kind == "layer_norm"
    assert norm.params["has_scale"]


def test_one_behind_the_other():
    kinds = [each.kind for each in found(lambda p, x: jax.nn.softmax(jax.nn.gelu(x), axis=1))]
    assert sorted(kinds) == ["gelu", "softmax"]


def test_softmax_is_found_behind_its_mask():
    def net(p, x):
        return jax.nn.softmax(jnp.where(np.tri(5, 8, dtype=bool), x, -1e9))

    (softmax,) = found(net)
    assert softmax.params == {"axis": 2}


def test_a_softmax_along_two_axes_is_none():
    assert not found(lambda p, x: jax.nn.softmax(x, axis=(1, 2)))


@pytest.mark.parametrize(
    ("shift", "is_softmax"),
    [
        (lambda p, x: x.max(-1, keepdims=True), True),
        (lambda p, x: jnp.maximum(x.max(-1, keepdims=True), 0.0), True),
        (lambda p, x: p["sample"], True),
        (lambda p, x: p["channel"], False),
        (lambda p, x: x.max(1, keepdims=True), False),
        (lambda p, x: jnp.maximum(x, 0.0), False),
    ],
)
def test_what_is_subtracted_in_a_softmax_is_one_value_along_its_axis(shift, is_softmax):
    def net(p, x):
        unit = jnp.exp(x - shift(p, x))
        return unit / unit.sum(-1, keepdims=True)

    params = {"sample": networks.images(1, (3, 5, 1)), "channel": networks.images(2, (8,))}
    assert bool(found(net, params)) == is_softmax


def test_only_the_kinds_that_are_asked_for():
    graph = trace.trace(lambda p, x: jax.nn.softmax(jax.nn.gelu(x)), {}, (X,))
    (only,) = operators.find_operators(graph, ("gelu",)).values()
    assert only.kind == "gelu"
