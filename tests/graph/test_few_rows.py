"""Lookups in tables of a few rows are found, and only those."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.graph import operators, trace

IDS = np.array([[0, 1, 1], [1, 0, 0]], np.int32)


def found(function, rows=2):
    graph = trace.trace(function, {"table": np.ones((rows, 4), np.float32)}, (IDS,))
    return [each.params for each in operators.find_operators(graph, ("few_rows",)).values()]


@pytest.mark.parametrize(("mode", "fills"), [("fill", True), ("clip", False), (None, True)])
def test_whole_rows_by_their_numbers(mode: str | None, fills: bool):
    assert found(lambda p, ids: p["table"].at[ids].get(mode=mode or "fill")) == [{"fills": fills}]
    assert found(lambda p, ids: jnp.take(p["table"], ids, axis=0, mode=mode)) == [{"fills": fills}]


def test_also_where_each_token_has_the_same():
    assert found(lambda p, ids: jnp.take(p["table"], jnp.zeros_like(ids), axis=0) * 2)


def test_not_of_many_rows_nor_of_parts_of_rows():
    take = lambda p, ids: jnp.take(p["table"], ids, axis=0)  # noqa: E731
    assert found(take, rows=8)
    assert not found(take, rows=9)
    assert not found(lambda p, ids: jnp.take(p["table"], ids, axis=1))
    computed = lambda p, ids: jnp.take(p["table"] * ids[0, 0].astype(jnp.float32), ids, axis=0)  # noqa: E731
    assert not found(computed)
