"""A lookup in a float table of a few rows, such as BERT's two types of tokens.

Reading one of so few rows for each token takes the time of reading as many floats as there are
activations, where choosing among rows that are at hand takes next to none.
"""

from __future__ import annotations

from jaxquant.graph import ir, kinds, matching

_MOST_ROWS = 8


def match(graph: ir.Graph, lookup: ir.Equation) -> matching.Match | None:
    """The lookup, which reads the numbers of rows [..., 1] and the table; None of others."""
    if not kinds.is_lookup(graph, lookup):
        return None
    table, numbers = lookup.inputs
    if isinstance(table, ir.Literal) or isinstance(numbers, ir.Literal):
        return None
    # More rows than these are cheaper to gather.
    if graph.shape(table)[0] > _MOST_ROWS:
        return None
    # By the mode a number out of range gives NaN, or the nearest row.
    fills = "FILL" in str(lookup.params["mode"])
    return matching.Match((numbers, table), frozenset({lookup.index}), {"fills": fills})
