"""What still runs, and which parameters are still read in float, once sites are int8."""

from __future__ import annotations

from collections.abc import Sequence

from jaxquant.graph import ir
from jaxquant.plan.plan import Int8Site


def live_equations(
    graph: ir.Graph, sites: Sequence[Int8Site]
) -> tuple[list[ir.Equation], list[ir.Var]]:
    """What runs beside the int8 weights: the equations in order, and the sources they read.

    A site stands for everything between its root and the end of its epilogue.
    """
    by_output = {s.epilogue.output: s for s in sites}
    needed: set[int] = set()
    sources: set[ir.Var] = set()
    stack = list(graph.output_vars)
    while stack:
        var = stack.pop()
        eqn = graph.producer.get(var)
        if eqn is None:
            sources.add(var)
        elif eqn.index not in needed:
            needed.add(eqn.index)
            stack.extend([by_output[var].root] if var in by_output else eqn.input_vars)
    return [eqn for eqn in graph.equations if eqn.index in needed], sorted(sources)


def float_leaves(graph: ir.Graph, sites: Sequence[Int8Site]) -> list[ir.Var]:
    """The parameter leaves that are still read in float."""
    sources = set(live_equations(graph, sites)[1])
    return [var for var in graph.leaves if var in sources]
