"""Layer normalization, as libraries and users write it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxquant.graph import layer_norm, trace
from tests import networks

X = networks.images(0, (3, 5, 8))
VECTORS = {"scale": networks.images(1, (8,)), "bias": networks.images(2, (8,))}
EPSILON = 1e-5


def matches(function, params, x=X):
    """What is found, from the last equation on."""
    with jax.numpy_dtype_promotion("standard"):
        graph = trace.trace(function, params, (x,))
    found = (layer_norm.match(graph, eqn) for eqn in reversed(graph.equations))
    return [match for match in found if match is not None]


def linen(x=X, **settings):
    module = nn.LayerNorm(EPSILON, **settings)
    with jax.numpy_dtype_promotion("standard"):  # the statistics of bfloat16 are float32
        return module.apply, module.init(jax.random.key(0), x), x


def of_nnx():
    graph, state = nnx.split(nnx.LayerNorm(8, epsilon=EPSILON, rngs=nnx.Rngs(0)))
    return lambda state, x: nnx.merge(graph, state)(x), state, X


def by_hand(p, x):
    centered = x - x.mean(1, keepdims=True)
    return centered / jnp.sqrt((centered * centered).mean(1, keepdims=True) + EPSILON)


def with_inverse(p, x):
    """Haiku's order of the factors."""
    inverse = p["scale"] * jax.lax.rsqrt(x.var(-1, keepdims=True) + EPSILON)
    return inverse * (x - x.mean(-1, keepdims=True)) + p["bias"]


def by_rows(p, x):
    """Equinox's, of one vector, under `vmap`."""

    def norm(row):
        variance = jnp.maximum(0.0, jnp.var(row, keepdims=True))
        inverse = jax.lax.rsqrt(variance + EPSILON)
        return p["scale"] * ((row - jnp.mean(row, keepdims=True)) * inverse) + p["bias"]

    return jax.vmap(jax.vmap(norm))(x)


FORMS = {
    "linen": (linen(), 2, True, True),
    "linen, variance of differences": (linen(use_fast_variance=False), 2, True, True),
    "linen, bare": (linen(use_scale=False, use_bias=False), 2, False, False),
    "linen, no bias": (linen(use_bias=False), 2, True, False),
    "linen, bfloat16": (linen(X.astype(jnp.bfloat16), dtype=jnp.bfloat16), 2, True, True),
    "nnx": (of_nnx(), 2, True, True),
    "standardize": ((lambda p, x: jax.nn.standardize(x, epsilon=EPSILON), {}, X), 2, False, False),
    "another axis": ((by_hand, {}, X), 1, False, False),
    "equinox": ((by_rows, VECTORS, X), 2, True, True),
    "haiku": ((with_inverse, VECTORS, X), 2, True, True),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    case, axis, has_scale, has_bias = FORMS[name]
    match = matches(*case)[0]
    assert match.params["axis"] == axis
    assert match.params["epsilon"] == pytest.approx(EPSILON)
    assert (match.params["has_scale"], match.params["has_bias"]) == (has_scale, has_bias)
    assert len(match.inputs) == 1 + has_scale + has_bias


def shared(p, x):
    """The deviation is an output too."""
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPSILON)
    return (x - mean) * inverse, inverse


OTHERS = {
    "RMSNorm": lambda p, x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON),
    "no epsilon": lambda p, x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True),
    "two axes": lambda p, x: jax.nn.standardize(x, axis=(1, 2)),
    "two means": lambda p, x: (
        (x - x.mean(1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)
    ),
    "a half of the deviation": lambda p, x: (
        (x - x.mean(-1, keepdims=True)) * jnp.sqrt(x.var(-1, keepdims=True) + EPSILON)
    ),
    "a sample's variance": lambda p, x: (
        (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + EPSILON)
    ),
    "shared": shared,
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    assert not matches(OTHERS[name], {})


def test_a_divided_scale_stays_outside():
    def net(p, x):
        return jax.nn.standardize(x, epsilon=EPSILON) / p["scale"]

    (match,) = matches(net, VECTORS)
    assert not match.params["has_scale"]


def mean_on_another_axis(p, x):
    return (x - x.mean(-1)[:, None, :]) * jax.lax.rsqrt(x.var(-1, keepdims=True) + EPSILON)


def variance_on_another_axis(p, x):
    centered = x - x.mean(-1, keepdims=True)
    return centered * jax.lax.rsqrt(x.var(-1)[:, None, :] + EPSILON)


def fast_variance_of_two_axes(p, x):
    mean = x.mean(-1)
    variance = jnp.square(x).mean(-1)[:, :, None] - jnp.square(mean)[:, None, :]
    return (x - mean[:, :, None]) * jax.lax.rsqrt(variance + EPSILON)


@pytest.mark.parametrize(
    "other", [mean_on_another_axis, variance_on_another_axis, fast_variance_of_two_axes]
)
def test_sums_that_are_spread_along_another_axis_of_the_same_size(other):
    assert matches(other, {}, networks.images(0, (3, 8, 8))) == []
