"""NaN that int8 hides, put where it would be: in a graph's outputs, and in what loops read."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir
from jaxquant.run.hidden import Hidden, Moved, Name, Terms
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.nonfinite import spread


def on_outputs(hidden: Hidden, state: Evaluation, outputs: Sequence[jax.Array]) -> list[jax.Array]:
    """The outputs of a graph, with the NaN that is hidden in them.

    Args:
      hidden: what int8 hides in the graph.
      state: its evaluation.
      outputs: what that gave.
    """
    marks = _Marks(hidden, state)
    return [marks.put(x, terms) for x, terms in zip(outputs, hidden.outputs, strict=True)]


def on_operands(hidden: Hidden, eqn: ir.Equation, lowering: Lowering) -> Lowering:
    """The lowering of an equation that is shown the NaN that is hidden in what it reads."""
    shown = hidden.shown[eqn.index]

    def with_nan(state: Evaluation) -> evaluate.Values:
        marks, env = _Marks(hidden, state), state.env.fork()
        for operand, terms in shown.items():
            var = eqn.inputs[operand]
            assert isinstance(var, int), "a literal hides nothing"
            env.write(var, marks.put(state.env.wide(var), terms))
        return lowering(state._replace(env=env))

    return with_nan


class _Marks:
    """The marks of one evaluation, as far as it has come."""

    def __init__(self, hidden: Hidden, state: Evaluation) -> None:
        self._hidden, self._state = hidden, state
        self._moved: dict[Moved, jax.Array | None] = {}

    def put(self, value: jax.Array, terms: Terms) -> jax.Array:
        """A tensor with NaN in the rows that are marked."""
        for rows, names in terms.items():
            bad = self._any(names)
            if bad is not None:
                bad = bad.any() if rows is None else spread(bad, rows)
                value = jnp.where(bad, jnp.asarray(jnp.nan, value.dtype), value)
        return value

    def _any(self, names: frozenset[Name]) -> jax.Array | None:
        """Which rows one of some marks names; None where nothing was quantized.

        As a whole where one of them marks a tensor as a whole.
        """
        values = [self._value(name) for name in sorted(names, key=str)]
        found = [value for value in values if value is not None]
        if len({value.shape for value in found}) > 1:
            found = [value.any() for value in found]
        return functools.reduce(jnp.logical_or, found) if found else None

    def _value(self, name: Name) -> jax.Array | None:
        if not isinstance(name, Moved):
            marks = self._state.quantized.marks
            if name in marks:
                return marks[name]
            return self._any(self._hidden.origins[name] & marks.keys())
        if name not in self._moved:
            move, names = self._hidden.moves[name]
            value = self._any(names)
            env = self._state.env
            self._moved[name] = None if value is None else move.run(value, env.read)
        return self._moved[name]
