"""What is computed of parameters alone is the same in NumPy as in the model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import evaluate
from jaxquant.graph.static_values import static_values
from jaxquant.graph.trace import trace
from jaxquant.run.float_forms import evaluate_float


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 5):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def network(dtype: Any = jnp.float32) -> tuple[Any, Any, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)
    variables = Net().init(jax.random.key(0), x)
    rng = np.random.default_rng(1)
    random = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), dtype), variables)
    return Net().apply, random, x.astype(dtype)


def all_static(graph, params, known):
    """The values of all static tensors by JAX."""
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    static = [eqn for eqn in graph.equations if graph.static[eqn.outputs[0]]]
    table = evaluate.float_table(static)
    env = evaluate.evaluate(graph, leaves, [None] * len(graph.inputs), table)
    return {var: env.read(var) for var in known}


def test_the_values_of_a_normalization():
    apply_fn, params, x = network()
    graph = trace(apply_fn, params, (x,))
    known = static_values(graph, params)
    assert {graph.producer[var].name for var in known} >= {"add", "mul", "rsqrt"}
    for var, want in all_static(graph, params, known).items():
        spread = np.broadcast_to(known[var], graph.shape(var))
        np.testing.assert_allclose(spread, want, rtol=1e-6)
        assert known[var].size <= 8  # not spread over the image


@pytest.mark.parametrize(
    "function",
    [
        lambda p: jnp.sqrt(p) / (p * p - 3.0),
        lambda p: -jnp.maximum(p, 1.0) + jnp.minimum(p, 0.5),
        lambda p: jnp.square(p)[None, :, None] + p[:, None],
        lambda p: p.reshape(2, 3).sum(0),  # not elementwise: missing
        lambda p: jnp.broadcast_to(p, (4, 6)).reshape(2, 12),
        lambda p: jnp.squeeze(p[None, :, None], 2),
        lambda p: p.astype(jnp.bfloat16).astype(jnp.float32),
        lambda p: jnp.log(p) / 0.0,
        lambda p: p * jnp.arange(6, dtype=jnp.float32),  # an equation without inputs
    ],
)
def test_each_kind_of_function(function):
    params = jnp.asarray(np.random.default_rng(0).uniform(0.1, 2, 6), jnp.float32)
    graph = trace(lambda p, x: function(p) * x.sum(), params, (np.ones(2, np.float32),))
    known = static_values(graph, params)
    for var, want in all_static(graph, params, known).items():
        np.testing.assert_allclose(np.broadcast_to(known[var], want.shape), want, rtol=1e-6)
        assert known[var].dtype == np.float32


def test_other_dtypes_and_large_values_are_left_to_jax():
    apply_fn, params, x = network(jnp.bfloat16)
    graph = trace(apply_fn, params, (x,))
    assert not static_values(graph, params)
    params = {"large": np.ones(2**21, np.float32), "small": np.ones(3, np.float32)}
    graph = trace(lambda p, x: (p["large"] * 2)[:3] * x + p["small"] * 2, params, (np.ones(3),))
    (known,) = static_values(graph, params).values()
    np.testing.assert_array_equal(known, [2, 2, 2])


def test_a_model_with_known_values_gives_the_same():
    apply_fn, params, x = network()
    graph = trace(apply_fn, params, (x,))

    @jax.jit
    def run(params, known, x):
        env = evaluate_float(graph, params, [x], known=known)
        return [env.read(var) for eqn in graph.equations for var in eqn.outputs]

    plain, known = run(params, {}, x), run(params, static_values(graph, params), x)
    for a, b in zip(plain, known, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    text = jax.jit(run).lower(params, static_values(graph, params), x).as_text()
    assert "rsqrt" not in text
