"""A scan that runs in Python is the scan that JAX runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph import evaluate, loops
from jaxquant.graph.trace import trace
from jaxquant.jax_shim import jaxprs


@pytest.mark.parametrize("reverse", [False, True])
def test_the_steps_of_a_scan_in_turn(reverse: bool):
    def apply_fn(params: None, x: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            return carry * 2 + row * x[0], carry - row

        return lax.scan(step, x, rows, reverse=reverse)

    x, rows = np.float32([1, 2]), np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = trace(apply_fn, None, (x, rows))
    eqn = next(eqn for eqn in graph.equations if eqn.name == "scan")
    body = jaxprs.jaxpr_as_fun(eqn.params["jaxpr"])
    order = []

    def step(number, values):
        order.append(number)
        return body(*values)

    env = evaluate.evaluate(graph, {}, [x, rows])
    found = loops.run_in_turn(eqn, [env.read(operand) for operand in eqn.inputs], step)
    assert order == ([2, 1, 0] if reverse else [0, 1, 2])
    wanted = apply_fn(None, jnp.asarray(x), jnp.asarray(rows))
    for ours, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, expected)
