"""Inputs of one sequence and of two."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph.model import FloatModel
from jaxquant.graph.sequences import Sequences, find_sequences


def sequences(function: Any, count: int) -> Sequences:
    inputs = tuple(jnp.ones((2, 5, 4)) for _ in range(count))
    model = FloatModel(lambda p, *args: function(*args), {"w": jnp.ones(3)}).trace(inputs)
    return find_sequences(model, tuple(range(count)))


def attend(x: jax.Array, y: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.einsum("btd,bsd->bts", y, x)) @ x


def test_what_meets_position_by_position_is_of_one():
    found = sequences(lambda x, y, z: jnp.tanh(x + y) * z, 3)
    assert found.of([0]) == {0, 1, 2}
    assert not found.apart


def test_queries_and_keys_are_of_two():
    found = sequences(lambda x, kinds, y, order: attend(x + kinds, y * order), 4)
    assert found.groups == ({0, 1}, {2, 3})
    assert found.are_apart(1, 2)
    assert not found.are_apart(0, 1)


def test_what_meets_in_a_loop_is_of_one():
    found = sequences(lambda x, y: jax.lax.fori_loop(0, 3, lambda _, x: x + y, x), 2)
    assert found.of([1]) == {0, 1}


def test_of_what_never_meets_nothing_is_known():
    found = sequences(lambda x, y: (x @ x.swapaxes(1, 2), y + 1), 2)
    assert found.groups == ({0}, {1})
    assert not found.are_apart(0, 1)
