"""Equations have one number where they compute the same, and others where they do not."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph.alike import number_alike
from jaxquant.graph.trace import trace

X = np.zeros((4, 6), np.float32)


def numbers(function, *operands):
    """The numbers of a function's equations of each primitive, in order."""
    graph = trace(lambda _, *given: function(*given), (), operands)
    alike = number_alike(graph.equations)
    found = {}
    for eqn in graph.equations:
        found.setdefault(eqn.name, []).append(alike[eqn.index])
    return found


def test_what_is_read_makes_no_difference():
    first, second = numbers(lambda x: jnp.tanh(jnp.tanh(x)), X)["tanh"]
    assert first == second


def test_literals_and_their_places_do():
    found = numbers(lambda x: (x * 2) * 2 * 3 - 1 - (1 - x), X)
    twice, again, thrice = found["mul"]
    assert twice == again != thrice
    assert found["sub"][0] != found["sub"][1]


def test_parameters_do():
    one, other, same = numbers(lambda x: (x.sum(0), x.sum(1), x.sum(0)), X)["reduce_sum"]
    assert one == same != other


def test_bodies_are_compared_by_what_they_compute():
    def loop(factor):
        return lambda c: jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x * factor), c)

    (found,) = numbers(lambda x: [loop(2.0)(x), loop(2.0)(x), loop(3.0)(x)], X).values()
    assert found[0] == found[1] != found[2]
