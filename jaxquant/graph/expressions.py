"""Which static tensors are computed alike."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NewType

from jaxquant.graph import ir

Expression = NewType("Expression", int)


class Expressions:
    """Numbers for how tensors are computed; equal ones for tensors that are computed alike."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, Expression] = {}

    def number(self, *key: Hashable) -> Expression:
        """The number of what a key tells of."""
        return self._numbers.setdefault(key, Expression(len(self._numbers)))

    def of_graph(
        self, graph: ir.Graph, sources: Mapping[ir.Var, Expression]
    ) -> dict[ir.Var, Expression]:
        """The numbers of the static tensors of a graph.

        Args:
          graph: the graph.
          sources: those of its leaves and constants.
        """
        found = dict(sources)

        def of_atom(atom: ir.Atom) -> Any:
            if isinstance(atom, ir.Literal):
                return ("literal", atom.value.dtype.name, atom.value.tobytes())
            return found[atom]

        for eqn in graph.equations:
            if not eqn.outputs or not graph.static[eqn.outputs[0]]:
                continue
            # Equal operations on equal expressions are equal, whichever equation computes them.
            # By their text: parameters hold bodies, which are no keys.
            params = tuple(sorted((k, str(v)) for k, v in eqn.params.items()))
            operands = tuple(map(of_atom, eqn.inputs))
            for position, var in enumerate(eqn.outputs):
                found[var] = self.number(eqn.name, params, operands, position)
        return found


def find_expressions(graph: ir.Graph) -> dict[ir.Var, Expression]:
    """The numbers of the static tensors of one graph; `Model.expression` is for several."""
    numbers = Expressions()
    sources = {var: numbers.number("source", var) for var in (*graph.leaves, *graph.constants)}
    return numbers.of_graph(graph, sources)
