"""Exponentials divided by their sum along one axis: the end of a softmax.

What is before it, masks and the maximum that is taken away, may run otherwise: on integers, in
particular.
"""

from __future__ import annotations

from jaxquant.graph import ir, matching, primitives, softmax


def match(graph: ir.Graph, division: ir.Equation) -> matching.Match | None:
    """The division, with the sum and what spreads it; None of other equations."""
    if division.name != "div":
        return None
    numerator, denominator = division.inputs
    if not isinstance(numerator, int):
        return None
    exponential = matching.producer(graph, numerator)
    if exponential is None or exponential.name != "exp":
        return None
    members = {division.index}
    # exp(s) / sum(exp(s)), without the subtraction of the maximum, which is another operator.
    total = softmax.through_movement(graph, denominator, members)
    if total is None or total.name != "reduce_sum" or total.inputs[0] != numerator:
        return None
    members.add(total.index)
    # A kernel goes along one axis, and others read the quotient alone.
    if len(total.params["axes"]) != 1 or not matching.is_private(
        graph, members, division.outputs[0]
    ):
        return None
    (axis,) = total.params["axes"]
    if axis in _varying(graph, denominator, total):
        return None  # sums along another axis of the same size
    return matching.Match((numerator,), frozenset(members), {"axis": int(axis)})


def _varying(graph: ir.Graph, spread: ir.Atom, total: ir.Equation) -> frozenset[int]:
    """The axes of a sum, spread or not, along which it differs."""
    wide = frozenset(axis for axis, size in enumerate(graph.shape(spread)) if size != 1)
    eqn = matching.producer(graph, spread)
    if eqn is None or eqn == total:
        return wide
    # What spreads the sum may lay it along other axes than it has left.
    return wide & primitives.follow_axes(graph, eqn, _varying(graph, eqn.inputs[0], total))
