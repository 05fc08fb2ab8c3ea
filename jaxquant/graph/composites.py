"""Operations that JAX writes as several equations: softmax, functions of one tensor."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Set
from typing import TypeAlias

from jaxquant.graph import ir, primitives, softmax

# How an operation of several equations is found: a function (graph, last equation) that gives the
# tensor that it reads and the indices of all its equations, ascending; None of other equations.
Match: TypeAlias = Callable[[ir.Graph, ir.Equation], tuple[ir.Var, tuple[int, ...]] | None]

# The operations by kind.  Each reads its source in int8 and computes in float32.
PATTERNS: Mapping[str, Match] = {"softmax": softmax.match}


@dataclasses.dataclass(frozen=True)
class Composite:
    """One operation of several equations, none of whose inner tensors others read.

    Attributes:
      kind: of the operation, a key of `PATTERNS`.
      source: the tensor that it reads.
      members: the indices of its equations; the last one gives its result.
    """

    kind: str
    source: ir.Var
    members: tuple[int, ...]


class Composites:
    """What of one graph belongs together.  Each property is found once, when it is first read."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph

    @functools.cached_property
    def whole(self) -> Mapping[int, Composite]:
        """The operations of several equations by the index of their last equation."""
        return {
            eqn.index: Composite(kind, *found)
            for eqn in self._graph.equations
            for kind, match in PATTERNS.items()
            if (found := match(self._graph, eqn)) is not None
        }

    @functools.cached_property
    def normalisations(self) -> frozenset[int]:
        """The indices of the operations that gather a normalisation's statistics.

        What they gather over an axis or a neighbourhood of a tensor comes back, elementwise, to
        the tensor itself: `x - mean(x)`, `x / (k + sum of neighbours' squares) ** b`.  So do
        LayerNorm and local response normalisation, which have no int8 form; what `PATTERNS` has is
        not among them.
        """
        graph = self._graph
        taken = {index for composite in self.whole.values() for index in composite.members}
        # What softmax sums is no statistic of a normalisation.
        gathering = [e for e in graph.equations if _gathers(e) and e.index not in taken]
        # First as if every gathering were one of a normalisation; then those that come back are.
        origins, _ = _bases(graph, frozenset(e.index for e in gathering))
        gathering = [e for e in gathering if e.outputs[0] in origins]
        found: set[int] = set()
        while True:  # the variance is of x - mean(x): each round finds what the one before allows
            bases, _ = _bases(graph, frozenset(found))
            new = {
                eqn.index
                for eqn in gathering
                if eqn.index not in found and _returns_to_base(graph, eqn, origins, bases)
            }
            if not new:
                return frozenset(found)
            found |= new

    @property
    def bases(self) -> Mapping[ir.Var, ir.Var]:
        """Tensor -> the tensor that it is a function of, for those that are a function of one.

        A function is elementwise, may use its tensor twice (`x * sigmoid(x)`), may pass through
        rearrangements, and may normalise: `(x - mean(x)) / std(x)`.  An elementwise operation of
        two different tensors starts a new one.
        """
        return self._followed[0]

    @functools.cached_property
    def normalising(self) -> frozenset[int]:
        """The indices of all equations from a normalisation's statistics to its result."""
        return frozenset(self._graph.producer[var].index for var in self._followed[1])

    @functools.cached_property
    def _followed(self) -> tuple[Mapping[ir.Var, ir.Var], Set[ir.Var]]:
        return _bases(self._graph, self.normalisations)


def _gathers(eqn: ir.Equation) -> bool:
    return eqn.name.startswith(("reduce_", "cum", "pad", "slice", "concatenate", "stack"))


def _bases(graph: ir.Graph, gathering: frozenset[int]) -> tuple[dict[ir.Var, ir.Var], set[ir.Var]]:
    """Follow functions of one tensor through elementwise operations, movements and `gathering`.

    Returns:
      Tensor -> the tensor that it is a function of, and the tensors behind `gathering`.
    """
    bases: dict[ir.Var, ir.Var] = {}
    behind: set[ir.Var] = set()
    for eqn in graph.equations:
        dynamic = [v for v in eqn.input_vars if not graph.static[v]]
        # Literals and parameters add no second tensor.
        if not dynamic or len(eqn.outputs) != 1:
            continue
        # Behind a statistic the tensor comes back through a broadcast to the size that it had.
        is_behind = eqn.index in gathering or any(v in behind for v in dynamic)
        if not (
            primitives.is_elementwise(eqn)
            or primitives.is_movement(graph, eqn)
            or eqn.index in gathering
            or (is_behind and eqn.name == "broadcast_in_dim")
        ):
            continue
        # Two different bases meet: the result is a function of both, and a tensor of its own.
        found = {bases.get(v, v) for v in dynamic}
        if len(found) == 1:
            (bases[eqn.outputs[0]],) = found
            if is_behind:
                behind.add(eqn.outputs[0])
    return bases, behind


def _returns_to_base(
    graph: ir.Graph,
    eqn: ir.Equation,
    origins: dict[ir.Var, ir.Var],
    bases: dict[ir.Var, ir.Var],
) -> bool:
    """True where what `eqn` gives meets, elementwise, its tensor or a function of it in `bases`."""
    origin = origins[eqn.outputs[0]]
    # The statistic is of this tensor, or of what it is a function of.
    base = bases.get(eqn.input_vars[0], eqn.input_vars[0])
    # Breadth does not matter: whichever way it comes back, it is a statistic of the tensor.
    gathered, stack = {eqn.outputs[0]}, [eqn.outputs[0]]
    while stack:
        for user in graph.consumers.get(stack.pop(), ()):
            if not user.outputs:  # it has an effect alone, or a choice hands on what it was given
                continue
            if origins.get(user.outputs[0]) != origin or user.outputs[0] in gathered:
                continue
            if primitives.is_elementwise(user) and any(
                v not in gathered and bases.get(v, v) == base
                for v in user.input_vars
                if not graph.static[v]
            ):
                return True
            gathered.add(user.outputs[0])
            stack.append(user.outputs[0])
    return False
