"""Static tensors that are computed alike."""

import jax.numpy as jnp

from jaxquant.graph.expressions import find_expressions
from jaxquant.graph.trace import trace


def test_equal_static_computations_share_an_expression():
    def apply_fn(p, x):
        return x + jnp.sqrt(p["w"]), x - jnp.sqrt(p["w"]), x * jnp.sqrt(p["w"] + 1)

    graph = trace(apply_fn, {"w": jnp.ones(3)}, [jnp.ones(3)])
    expressions = find_expressions(graph)
    same, again, other = (expressions[graph.producer[out].inputs[1]] for out in graph.outputs)
    assert same == again
    assert same != other
