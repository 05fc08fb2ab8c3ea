"""GELU, as libraries and users write it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import gelu, trace
from tests import networks

X = networks.images(0, (3, 8))
ROOT = float(np.sqrt(2 / np.pi))


def matches(function, x=X):
    graph = trace.trace(lambda p, x: function(x), {}, (x,))
    found = (gelu.match(graph, eqn) for eqn in reversed(graph.equations))
    return [match for match in found if match is not None]


EXACT = {
    "jax": lambda x: jax.nn.gelu(x, approximate=False),
    "erf": lambda x: 0.5 * x * (1 + jax.lax.erf(x / jnp.sqrt(2.0))),
    "halved last": lambda x: x * (1 + jax.lax.erf(x * np.float32(0.5**0.5))) / 2,
    "shifted before": lambda x: jax.nn.gelu(x + 1, approximate=False),
}
TANH = {
    "jax": jax.nn.gelu,
    "products": lambda x: 0.5 * x * (1 + jnp.tanh(ROOT * (x + 0.044715 * x * x * x))),
    "one cube": lambda x: x * (0.5 * (1 + jnp.tanh(x * ROOT * (1 + 0.044715 * jnp.square(x))))),
}
OTHERS = {
    "another erf": lambda x: 0.5 * x * (1 + jax.lax.erf(x)),
    "another tanh": lambda x: 0.5 * x * (1 + jnp.tanh(x)),
    "swish": jax.nn.swish,
    "of two tensors": lambda x: 0.5 * x * (1 + jax.lax.erf(x[::-1] / jnp.sqrt(2.0))),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_forms(name):
    (match,) = matches(EXACT[name])
    assert match.params == {"approximate": "none"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", TANH)
def test_tanh_forms(name, dtype):
    (match,) = matches(TANH[name], X.astype(dtype))
    assert match.params == {"approximate": "tanh"}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    assert not matches(OTHERS[name])


def test_what_is_read_inside_is_none():
    def net(x):
        inner = 1 + jax.lax.erf(x / jnp.sqrt(2.0))
        return 0.5 * x * inner, inner

    assert not matches(net)
