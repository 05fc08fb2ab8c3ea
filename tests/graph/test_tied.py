"""Dots with the transpose of a table that rows are looked up in read the table itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import evaluate
from jaxquant.graph.model import trace_model
from tests import networks

PARAMS = {"table": networks.images(0, (9, 5)), "other": networks.images(1, (9, 5))}
IDS = jnp.arange(6).reshape(2, 3)


def by_itself(p, ids):
    table = p["table"].astype(jnp.bfloat16)
    return table[ids] @ p["table"].astype(jnp.bfloat16).T


def looping(p, ids):
    step = lambda _, x: jnp.tanh(x @ p["table"].T) @ p["other"]  # noqa: E731
    return jax.lax.fori_loop(0, 2, step, p["table"][ids])


def looked_up_in(loop):
    """A recurrent model of words: the table is read in the loop, and tied behind it."""

    def apply_fn(p, ids):
        start = jnp.zeros((ids.shape[0], 5))
        if loop == "scan":
            h, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h + p["table"][x]), None), start, ids.T)
        elif loop == "while":
            step = lambda c: (c[0] + 1, jnp.tanh(c[1] + jnp.take(p["table"], ids[:, 0], 0)))  # noqa: E731
            h = jax.lax.while_loop(lambda c: c[0] < 2, step, (0, start))[1]
        else:
            h = jax.lax.cond(ids[0, 0] < 9, lambda: p["table"][ids[:, 0]], lambda: start)
        return h @ p["table"].T

    return apply_fn


# name: (function, the shape of the weight of its dot)
MODELS = {
    "an output layer": (lambda p, ids: p["table"][ids] @ p["table"].T, (9, 5)),
    "the table first": (lambda p, ids: p["table"].T @ jnp.tanh(p["table"][ids[0]] @ p["other"].T).T
                        .repeat(3, 0)[:9], (9, 5)),
    "each cast by itself": (by_itself, (9, 5)),
    "in a loop": (looping, (9, 5)),
    **{f"looked up in a {x}": (looked_up_in(x), (9, 5)) for x in ("scan", "while", "cond")},
    "another table": (lambda p, ids: p["table"][ids] @ p["other"].T, (5, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_weight_is_the_table(name):
    apply_fn, shape = MODELS[name]
    model = trace_model(apply_fn, PARAMS, (IDS,))
    parts = [model, *(body for bodies in model.bodies.values() for body in bodies)]
    dots = [
        (p.graph, s) for p in parts for s in p.sites if s.kind == "mul" and s.weight is not None
    ]
    path = "other" if name == "another table" else "table"
    assert [graph.shape(s.weight) for graph, s in dots if s.weight_path == path] == [shape]
    leaves = dict(zip(model.graph.leaves, jax.tree.leaves(PARAMS), strict=True))
    table = evaluate.float_table(model.graph.equations)
    found = evaluate.outputs(evaluate.evaluate(model.graph, leaves, [IDS], table))
    wanted = apply_fn(PARAMS, IDS)
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), rtol=1e-5, atol=1e-5)
