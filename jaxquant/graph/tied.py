"""Output layers that are tied to an embedding: dots that read its table as it is stored.

`embed.attend`, `x @ table.T`: the dot sums over the rows' axis of the table, so the transpose
between them is written into the dot.  The layer's weight is the table itself then, its channels
are the rows, and one array with one scale a row serves both the lookup and the dot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from jaxquant.graph import ir, kinds
from jaxquant.graph.contraction import DOT
from jaxquant.graph.expressions import find_expressions
from jaxquant.jax_shim import jaxprs


def with_tied_tables(graph: ir.Graph, tables: Collection[ir.Var] = ()) -> ir.Graph:
    """The graph with dots on the tables of its embeddings in place of dots on their transposes.

    Args:
      graph: of a model or a body.
      tables: leaves of a body that are looked up outside.
    """
    looked_up = {*tables, *find_tables(graph)}
    dots = [eqn for eqn in graph.equations if eqn.name == DOT]
    turned = [eqn for eqn in dots if any(_transposed(graph, x) is not None for x in eqn.inputs)]
    if not looked_up or not turned:
        return graph
    # The lookup and the dot may each have a cast of the table of their own.
    expressions = find_expressions(graph)
    alike = {expressions[var] for var in looked_up}

    def with_table(eqn: ir.Equation) -> ir.Equation:
        for side, atom in enumerate(eqn.inputs):
            table = _transposed(graph, atom)
            if table is not None and expressions[table] in alike:
                eqn = _on_table(eqn, side, table)
        return eqn

    replaced = {eqn.index: with_table(eqn) for eqn in turned}
    # The transposes stay; nothing reads them any more, so they are not run.
    return dataclasses.replace(
        graph, equations=tuple(replaced.get(eqn.index, eqn) for eqn in graph.equations)
    )


def find_tables(graph: ir.Graph) -> frozenset[ir.Var]:
    """The static matrices that rows are looked up in by indices that depend on the inputs.

    Also inside the loops and choices of the graph, in what all steps read alike.
    """
    found: set[ir.Var] = set()
    for eqn in graph.equations:
        if not eqn.outputs or graph.static[eqn.outputs[0]]:
            continue
        if kinds.is_lookup(graph, eqn):
            found.add(eqn.input_vars[0])
        # A loop may look rows up in a table that it is given.
        for place in jaxprs.looked_up(eqn.name, eqn.params):
            table = eqn.inputs[place]
            if isinstance(table, int) and graph.static[table]:
                found.add(table)
    return frozenset(found)


def _transposed(graph: ir.Graph, atom: ir.Atom) -> ir.Var | None:
    """The static matrix that an operand is the transpose of; None where it is none."""
    if not isinstance(atom, int) or not graph.static[atom]:
        return None
    eqn = graph.producer.get(atom)
    # A matrix turned over, not one whose axes stay.
    if eqn is None or eqn.name != "transpose" or tuple(eqn.params["permutation"]) != (1, 0):
        return None
    return eqn.input_vars[0]


def _on_table(eqn: ir.Equation, side: int, table: ir.Var) -> ir.Equation:
    """A dot with the transposed matrix at one side, as one with the matrix itself."""
    inputs = tuple(table if k == side else x for k, x in enumerate(eqn.inputs))
    numbers: Any = tuple(
        # Turned over, an axis of the matrix is the other one.
        tuple(tuple(1 - a for a in axes) if k == side else tuple(axes) for k, axes in enumerate(of))
        for of in eqn.params["dimension_numbers"]
    )
    return dataclasses.replace(
        eqn, inputs=inputs, params={**eqn.params, "dimension_numbers": numbers}
    )
