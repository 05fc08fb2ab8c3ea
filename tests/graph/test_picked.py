"""Scans that pick rows of weights by the number of their step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph import evaluate
from jaxquant.graph.model import trace_model
from tests import networks

LAYERS, WIDTH = 3, 4
PARAMS = {
    "a": networks.images(0, (LAYERS, WIDTH, WIDTH)),
    "b": networks.images(1, (LAYERS, WIDTH, WIDTH)),
}
X = networks.images(2, (2, WIDTH))
NUMBERS = np.array([2, 0, 1])


def fori(first, last, step):
    return lambda p, x: lax.fori_loop(first, last, lambda i, x: step(p, i, x), x)


def scan(numbers, step, **options):
    def run(p, x):
        return lax.scan(lambda x, i: (step(p, i, x), None), x, numbers(), **options)[0]

    return run


def dot(p, i, x):
    return jnp.tanh(x @ p["a"][i])


def in_calls(p, i, x):
    """Twice the same jitted function, of one jaxpr, on different stacks, and `checkpoint`."""

    @jax.checkpoint
    def inside(x):
        first = lax.dynamic_index_in_dim(p["a"], i, keepdims=False)
        return x @ first + x @ lax.dynamic_index_in_dim(p["b"], LAYERS - 1 - i, keepdims=False)

    return jnp.tanh(inside(x))


def in_while(p, x):
    def again(carry):
        return carry[0] + 1, fori(0, LAYERS, dot)(p, carry[1])

    return lax.while_loop(lambda carry: carry[0] < 2, again, (jnp.int32(0), x))[1]


# name: (function, the numbers of layers around its dots)
PICKED = {
    "fori": (fori(0, LAYERS, dot), [(3,)]),
    "a part": (fori(1, LAYERS, dot), [(2,)]),
    "numbers": (scan(lambda: jnp.arange(LAYERS), dot), [(3,)]),
    "another order": (scan(lambda: NUMBERS, dot, reverse=True), [(3,)]),
    "take": (fori(0, LAYERS, lambda p, i, x: x @ jnp.take(p["a"], i, axis=0)), [(3,)]),
    "calls": (fori(0, LAYERS, in_calls), [(3,), (3,)]),
    "while": (in_while, [(3,)]),
}
KEPT = {
    "twice": fori(0, 2 * LAYERS, lambda p, i, x: jnp.tanh(x @ p["a"][i // 2])),
    "by value": fori(0, LAYERS, lambda p, i, x: x @ p["a"][jnp.argmax(x[0]) % LAYERS]),
}


def layers_of_dots(model):
    """The numbers of layers around each dot with a weight."""
    found = [model.scans for site in model.sites if site.kind == "mul" and not site.inside]
    for body in (body for bodies in model.bodies.values() for body in bodies):
        found += layers_of_dots(body)
    return found


def assert_same_values(model, apply_fn):
    env = evaluate.evaluate_model(model.graph, PARAMS, [X])
    np.testing.assert_array_equal(evaluate.outputs(env), apply_fn(PARAMS, X))


@pytest.mark.parametrize("name", PICKED)
def test_known_rows_are_layers(name):
    apply_fn, layers = PICKED[name]
    model = trace_model(apply_fn, PARAMS, (X,))
    assert layers_of_dots(model) == layers
    assert_same_values(model, apply_fn)


@pytest.mark.parametrize("name", KEPT)
def test_other_rows_stay_picked(name):
    model = trace_model(KEPT[name], PARAMS, (X,))
    assert layers_of_dots(model) == []
    assert_same_values(model, KEPT[name])


def test_inputs_that_are_picked_from_are_no_weights():
    model = trace_model(fori(0, 2, lambda p, i, x: x.at[i].add(x[i] @ p["a"][0])), PARAMS, (X,))
    assert layers_of_dots(model) == [()]
