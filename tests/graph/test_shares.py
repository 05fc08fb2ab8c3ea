"""The end of a softmax is found by itself: exponentials divided by their own sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxquant.graph import operators, trace

X = jnp.ones((3, 4, 4))


def found(function, x=X):
    graph = trace.trace(lambda _, x: function(x), {}, (x,))
    (each, *others) = operators.find_operators(graph, ("shares",)).values() or (None,)
    assert not others
    return each


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_behind_any_shift(axis: int):
    each = found(lambda x: jax.nn.softmax(jnp.where(x > 0, x, -1e9), axis=axis))
    assert each.params == {"axis": axis}
    assert found(lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis, keepdims=True)) is None
    powers = lambda x: (e := jnp.exp(x), e / jnp.sum(e, axis, keepdims=True))[1]  # noqa: E731
    assert found(powers).params == {"axis": axis}


def test_not_sums_along_another_axis_of_the_same_size():
    def function(x):
        e = jnp.exp(x)
        return e / jnp.sum(e, 2)[:, None, :]

    assert found(function) is None


def test_not_where_others_read_the_sum():
    def function(x):
        e = jnp.exp(x)
        total = jnp.sum(e, -1, keepdims=True)
        return e / total, total

    assert found(function) is None
