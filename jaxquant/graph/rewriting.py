"""A graph that is made of another one, equation by equation."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxquant.graph import ir


class Rewriting:
    """What a new graph has so far; the tensors of the one before keep their numbers.

    Args:
      graph: the one before.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.avals = list(graph.avals)
        self.static = list(graph.static)
        self.equations: list[ir.Equation] = []

    def new(self, aval: Any, *, static: bool = False) -> ir.Var:
        """Another tensor."""
        self.avals.append(aval)
        self.static.append(static)
        return len(self.avals) - 1

    def add(self, eqn: ir.Equation, **changes: Any) -> int:
        """An equation like one of the graph before, with other fields; its index."""
        index = len(self.equations)
        # Its index is its place: who reads a graph counts on that.
        self.equations.append(dataclasses.replace(eqn, index=index, **changes))
        return index

    def done(self, **changes: Any) -> ir.Graph:
        """The new graph, with other fields than the one before had."""
        return dataclasses.replace(
            self.graph,
            avals=tuple(self.avals),
            static=tuple(self.static),
            equations=tuple(self.equations),
            **changes,
        )
