"""Scales with which no sum comes near the middle between two integers.

What is quantized is round(n * r): n, the int32 sum, is exact everywhere, but the ratio r of the
site's multiplier to the scale, and the product, are float32, and XLA, the native kernels, ONNX
Runtime and OpenVINO round them in different orders.  Where n * r is within such an error of k + 1/2
they give different integers.  Among some million activations a few are there, and a deep network
makes much of one.  So multipliers and scales are chosen such that none is:

- Sums that are quantized as they are: r = p / q with q odd.  2 n p = (2 k + 1) q has no solution,
  since one side is even and the other is odd, so n * r is at least 1 / (2 q) away from k + 1/2.
- Sums that are added before (to a residual), or quantized on several scales: every multiplier is a
  multiple of one power of two, the unit, so that float32 adds them without an error, in any order;
  a scale is an odd multiple t of the unit.  By the same argument the quotient is at least 1 / (2 t)
  away from k + 1/2; t is below 2^14, and two roundings of a number below 256 less than 2^-15 off.

A multiplier is made larger, never smaller, by way of the weight's scale: in the first case by less
than 2^-11 of it, in the second to the next multiple.  One below the unit becomes a multiple of its
half, quarter, ..., and an exact tie is possible there, if rare.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from jaxquant.graph import ir, primitives

EXCESS = 2.0**-11  # by what part of it a multiplier may grow to be a fraction
LARGEST_DENOMINATOR = 4096  # beyond which no smaller excess is looked for
_NUMERATORS = 16  # tried at a time
_BITS = 13  # of the multiple that the largest scale is of the unit, less one

_SELECTING = frozenset(
    {"max", "min", "clamp", "neg", "concatenate", "slice", "pad", "reduce_max", "reduce_window_max"}
)
_ADDING = frozenset({"add", "add_any", "sub"})


class Sums(NamedTuple):
    """Where the float value of a tensor is quantized.

    Attributes:
      entries: the tensors that are quantized from it alone, moved or selected from; none where it
        is added to another.
      together: those that are quantized from it and what it is added to, or selected with.
    """

    entries: frozenset[ir.Var]
    together: frozenset[ir.Var]


def find_sums(graph: ir.Graph, entries: Iterable[ir.Var]) -> dict[ir.Var, Sums]:
    """The tensors whose values arrive at a quantization by moving, selecting and adding alone.

    Args:
      graph: the traced model.
      entries: the tensors that are quantized from float.
    """
    parent: dict[ir.Var, ir.Var] = {}

    def root(var: ir.Var) -> ir.Var:
        while (above := parent.setdefault(var, var)) != var:
            var = above
        return var

    reached = {var: frozenset({var}) for var in entries}
    added: set[ir.Var] = set()
    for eqn in reversed(graph.equations):
        operands = [v for v in eqn.input_vars if not graph.static[v]]
        adds = eqn.name in _ADDING and len(operands) == 2
        if not (adds or eqn.name in _SELECTING or primitives.is_movement(graph, eqn)):
            continue
        (output,) = eqn.outputs
        for var in operands:
            parent[root(var)] = root(output)
            reached[var] = reached.get(var, frozenset()) | reached.get(output, frozenset())
            if adds or output in added:
                added.add(var)
    together: dict[ir.Var, frozenset[ir.Var]] = {}
    for var, found in reached.items():
        together[root(var)] = together.get(root(var), frozenset()) | found
    return {
        var: Sums(frozenset() if var in added else found, together[root(var)])
        for var, found in reached.items()
    }


def unit_of(scales: Iterable[float]) -> float:
    """The power of two whose odd multiples are the scales of what is quantized together."""
    return 2.0 ** (math.floor(math.log2(max(scales))) - _BITS)


def odd_multiple(scale: float, unit: float) -> float:
    """The odd multiple of `unit` that is nearest to `scale`.

    Example:
      >>> odd_multiple(0.7, 0.125), unit_of([odd_multiple(0.7, unit_of([0.7]))]) == unit_of([0.7])
      (0.625, True)
    """
    return (2 * math.floor(scale / unit / 2) + 1) * unit


def fractions(ratio: np.ndarray) -> np.ndarray:
    """The first p / q, q odd, that is not below and at most `EXCESS` above; else the nearest.

    Args:
      ratio: float64 [C], positive.

    Example:
      >>> (fractions(np.array([1 / 3, 0.25])) * np.array([3, 2051])).round(9).tolist()
      [1.0, 513.0]
    """
    found = np.full(ratio.shape, np.inf)
    is_open = np.ones(ratio.shape, bool)
    first = 1
    while is_open.any():
        some, nearest = ratio[is_open], found[is_open]
        for p in range(first, first + _NUMERATORS):
            most = np.floor(p / some)
            odd = np.maximum(most - (most % 2 == 0), 1)
            better = (most >= 1) & (nearest > some * (1 + EXCESS)) & (p / odd < nearest)
            nearest = np.where(better, p / odd, nearest)
        found[is_open] = nearest
        first += _NUMERATORS
        is_open = (found > ratio * (1 + EXCESS)) & (first <= LARGEST_DENOMINATOR * ratio)
    return np.where(np.isfinite(found), found, ratio)


def multiples(multiplier: np.ndarray, unit: float) -> np.ndarray:
    """The least multiples of `unit` that are not below; of its half, quarter, ... below the unit.

    They are less than twice the multiplier.  What is below the unit adds next to nothing to the
    quantized sum, but others may read it.

    Args:
      multiplier: float64 [C], positive.

    Example:
      >>> multiples(np.array([2.1, 1.0, 0.2]), 1.0).tolist()
      [3.0, 1.0, 0.25]
    """
    step = unit * np.exp2(np.minimum(np.floor(np.log2(multiplier / unit)), 0.0))
    return np.ceil(multiplier / step) * step
