"""What leaves rows where they are: a NaN in one of them stays in it, in float too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import trace_model
from jaxquant.graph.rows import Rows, axis_of, rows_along, sizes_around, through

N, T, D = 4, 3, 6
X = jax.random.normal(jax.random.key(0), (N, T, D))
W = jax.random.normal(jax.random.key(1), (D, D))


def last_rows(function, x) -> tuple[Rows | None, np.ndarray]:
    """The rows of the result of a function of x, and whether they are NaN where those of x are."""
    graph = trace_model(lambda p, x: function(x), {}, (x,)).graph
    rows = {graph.inputs[0]: rows_along(graph.shape(graph.inputs[0]), 0)}
    for eqn in graph.equations:
        for number, var in enumerate(eqn.inputs):
            if isinstance(var, int) and var in rows and (known := rows[var]) is not None:
                rows |= dict(zip(eqn.outputs, through(graph, eqn, number, known), strict=True))
    return rows.get(graph.outputs[0]), np.asarray(function(x.at[1].set(jnp.nan)))


KEPT = {
    "elementwise": lambda x: jnp.tanh(x) * x + 1,
    "dot": lambda x: x @ W,
    "pairs": lambda x: jnp.einsum("ntd,nsd->nts", x, x),
    "transpose": lambda x: x.transpose(1, 2, 0),
    "flat": lambda x: x.reshape(-1, D) @ W,
    "and back": lambda x: (x.reshape(-1, D) @ W).reshape(N, T, D).swapaxes(0, 1),
    "steps turned around": lambda x: x[:, ::-1],
    "sums of each": lambda x: x - x.mean((1, 2), keepdims=True),
    "running sums of each": lambda x: jnp.cumsum(x, 1),
    "sorted by itself": lambda x: lax.sort(x, dimension=1),
    "written in each": lambda x: lax.dynamic_update_slice(jnp.zeros((N, 5, D)), x, (0, 1, 0)),
    "joined features": lambda x: jnp.concatenate([x, 2 * x], 2),
    "pooled steps": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 2, 1), (1, 1, 1), "VALID"
    ),
}  # fmt: skip
MOVED = {
    "turned around": lambda x: x[::-1],
    "picked": lambda x: x[np.array([1, 0, 3, 2])],
    "rolled": lambda x: jnp.roll(x, 1, 0),
    "mean": lambda x: x.mean(0),
    "running sum": lambda x: jnp.cumsum(x, 0),
    "sorted": lambda x: lax.sort(x, dimension=0),
    "written": lambda x: lax.dynamic_update_slice(jnp.zeros((6, T, D)), x, (1, 0, 0)),
    "pooled": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 1, 1), (1, 1, 1), "SAME"),
    "summed": lambda x: jnp.einsum("ntd,ntd->td", x, x),
    "unknown": lambda x: jnp.fft.fft(x, axis=0).real,
}


@pytest.mark.parametrize("name", KEPT)
def test_rows_stay(name):
    rows, got = last_rows(KEPT[name], X)
    assert rows is not None
    axis, (before, size, within) = axis_of(rows), sizes_around(rows)
    assert before * size * within == got.shape[axis]
    by_row = np.moveaxis(got, axis, 0).reshape(before, size, -1)
    assert np.isnan(by_row).any(axis=(0, 2)).tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", MOVED)
def test_rows_that_move_are_not_followed(name):
    assert last_rows(MOVED[name], X)[0] is None
