"""Marks of rows move as the rows do: NaN in a row of the operand is NaN in those of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph import evaluate
from jaxquant.graph.model import trace_model
from jaxquant.graph.rows import axis_of, rows_along
from jaxquant.run.moved_rows import find_move

N, D = 6, 4
X = jax.random.normal(jax.random.key(0), (N, D))
K = jax.random.normal(jax.random.key(1), (3, D, D))
PICKED = jnp.array([3, 1, 0, 5])


def convolved(x, **options):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x[None], K, dimension_numbers=numbers, **options)[0]


def pooled(x, window, strides, padding):
    return lax.reduce_window(x, -jnp.inf, lax.max, (window, 1), (strides, 1), padding)


MOVES = {
    "reverse": lambda x: jnp.flip(x, 0),
    "slice": lambda x: x[1:6:2],
    "shift": lambda x: jnp.concatenate([jnp.zeros((1, D)), x[:-1]]),
    "roll": lambda x: jnp.roll(x, 2, 0),
    "pad": lambda x: lax.pad(x, 0.0, [(2, -1, 1), (0, 0, 0)]),
    "pick": lambda x: x[PICKED],
    "pick pairs": lambda x: x[PICKED.reshape(2, 2)],
    "pick out of range": lambda x: x.at[jnp.array([7, 2])].get(mode="fill", fill_value=0.0),
    "slice at": lambda x: lax.dynamic_slice(x, (PICKED[1], PICKED[2]), (3, D)),
    "write at": lambda x: lax.dynamic_update_slice(jnp.ones((9, D)), x, (PICKED[1], 0)),
    "split": lambda x: jnp.split(x, [2])[1],
    "convolve": lambda x: convolved(x, window_strides=(2,), padding=[(1, 1)]),
    "dilated": lambda x: convolved(x, window_strides=(1,), padding=[(2, 2)], rhs_dilation=(2,)),
    "upsample": lambda x: convolved(x, window_strides=(1,), padding=[(2, 2)], lhs_dilation=(2,)),
    "pool": lambda x: pooled(x, 2, 2, "SAME"),
    "cut": lambda x: x.reshape(3, 2, D),
}


@pytest.mark.parametrize("name", MOVES)
def test_as_the_float_function(name):
    """By the equations of a function one after the other, from a mark of its input's rows."""
    function = MOVES[name]
    graph = trace_model(lambda p, x: function(x), {}, (X,)).graph
    env = evaluate.evaluate(graph, {}, [X])
    moved = jax.jit(lambda mark: _moved(graph, env, mark))
    for row in range(N):
        mark = np.arange(N) == row
        want = np.isnan(function(X.at[row, 1].set(jnp.nan)))
        want = want.any(axis=tuple(range(1, want.ndim)))
        np.testing.assert_array_equal(moved(jnp.asarray(mark)), want, err_msg=f"row {row}")


def _moved(graph, env, mark):
    """The marks of the last tensor; a function of one operand each, but for an axis put first."""
    known = {graph.inputs[0]: (rows_along((N, D), 0), mark)}
    for eqn in graph.equations:
        for operand, var in enumerate(eqn.inputs):
            if not isinstance(var, int) or var not in known:
                continue
            rows, value = known[var]
            for number, result in enumerate(eqn.outputs):
                move = find_move(graph, eqn, operand, rows, number)
                if move is not None:
                    after, found = move.rows, move.run(value, env.read)
                else:  # an axis of size 1 comes or goes
                    place = axis_of(rows) + len(graph.shape(result)) - len(graph.shape(var))
                    after, found = rows_along(graph.shape(result), place), value
                if result in known:
                    found = found | known[result][1]
                known[result] = after, found
    return known[graph.outputs[0]][1]
