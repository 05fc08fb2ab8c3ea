"""Scales with which LiteRT's additions of int8 tensors come near no tie.

LiteRT's kernel adds two int8 tensors in integers: each times the ratio r of its scale to the
result's, rounded to a multiple of 2^(e - 20), where 2^e is the power of two below the larger of
both ratios.  On 255 integers either way the sum is off by less than 255 * 2^(e - 20).

All scales that meet in additions, those of a residual stream, are odd multiples of one unit, a
power of two 2^-10 of the largest of them.  Then the sum is n / t, t the result's scale in units,
and at least 1 / (2 t) away from k + 1/2 (`jaxquant.plan.ties` tells why).  The larger scale that is
added is below 2^11 units and r times t of them, so that 1 / (2 t) is r / 2^12 or more: not less
than 256 * 2^(e - 20).  So the kernel comes to the integers that float32 does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from jaxquant.graph import ir, primitives
from jaxquant.plan.binding import Binding

_BITS = 10  # of the multiple that the largest scale is of the unit, less one
_ADDING = ("add", "add_any", "sub")


def added_scales(binding: Binding) -> list[frozenset[str]]:
    """The names of the scales that meet in additions of two int8 tensors, those of one unit each.

    Args:
      binding: of one graph; what it holds in bodies is not looked at.
    """
    groups: list[frozenset[str]] = []
    for names in _additions(binding):
        # Additions with a scale in common have one unit together, through others too.
        meeting = [group for group in groups if not group.isdisjoint(names)]
        groups = [group for group in groups if group.isdisjoint(names)]
        groups.append(names.union(*meeting))
    return groups


def _additions(binding: Binding) -> Iterator[frozenset[str]]:
    """For each addition on integers the scales of what it reads and gives."""
    graph, scales = binding.graph, binding.scales
    for eqn in graph.equations:
        if eqn.name not in _ADDING or eqn.index not in binding.forms.reads_int8:
            continue
        # The sum itself is a float where clips follow: LiteRT fuses these, and rounds behind them.
        result = _quantized(binding, eqn.outputs[0])
        tensors = {*eqn.input_vars, result} - {None}
        # Both operands and the result on grids: then LiteRT adds integers.
        if result is None or len(eqn.input_vars) != 2 or not tensors <= binding.scales.keys():
            continue
        if not tensors & binding.per_channel:
            yield frozenset(scales[var] for var in tensors if var is not None)


def _quantized(binding: Binding, var: ir.Var) -> ir.Var | None:
    """The tensor behind clips that is quantized; None where something else happens before."""
    graph = binding.graph
    while var not in binding.names:
        readers = graph.consumers.get(var, ())
        if len(readers) != 1 or readers[0].name not in ("max", "min", "clamp"):
            return None
        # Clips with other tensors are no clips of LiteRT's kernel.
        numbers = [primitives.constant_scalar(graph, x) for x in readers[0].inputs if x != var]
        if None in numbers:
            return None
        (var,) = readers[0].outputs
    return var


def unit_of(largest: float) -> float:
    """The power of two whose odd multiples the scales are, of which this is the largest."""
    return 2.0 ** (math.floor(math.log2(largest)) - _BITS)
