"""Which calls run as one.

A chain may join the ones before it where it reads nothing that comes of their results by another
way: an operation between them that is none of them ends the sequence.  Most convolutional networks
are one sequence but for their ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.backends.backend import Call
from jaxquant.graph import ir
from jaxquant.run.calls import SiteCall
from jaxquant.run.lowerings import Evaluation


@dataclasses.dataclass(frozen=True)
class Members:
    """Consecutive calls.

    Attributes:
      chains: the index of each one's last equation, which names it.
      links: for each, the earlier ones that it reads: {"x": position, "residual": position}.
      later: the indices of equations that use their results, and come behind them all.
    """

    chains: tuple[int, ...]
    links: tuple[Mapping[str, int], ...]
    later: frozenset[int]


def find_sequences(
    graph: ir.Graph, calls: Mapping[int, SiteCall], joins: Callable[[Call], bool]
) -> list[Members]:
    """Sequences of two calls and more.

    Args:
      graph: the traced model.
      calls: by the index of their last equation.
      joins: whether a call may be one of several.
    """
    inside = {k: last for last, call in calls.items() for k in call.chain.members}
    found: list[Members] = []
    current = _Open(graph, joins)
    for eqn in graph.equations:
        # What lies between two calls and reads neither may run before or behind them both.
        if eqn.index not in inside:
            current.pass_by(eqn)
        # A call comes at its last equation: by then all that it reads is there.
        elif inside[eqn.index] == eqn.index and not current.join(eqn.index, calls[eqn.index]):
            found.append(current.members())
            current = _Open(graph, joins)
            current.join(eqn.index, calls[eqn.index])
    found.append(current.members())
    return [members for members in found if len(members.chains) > 1]


class _Open:
    """A sequence that grows."""

    def __init__(self, graph: ir.Graph, joins: Callable[[Call], bool]):
        self._graph = graph
        self._joins = joins
        self._calls: dict[int, SiteCall] = {}
        self._links: list[Mapping[str, int]] = []
        self._given: dict[tuple[ir.Var, bool], int] = {}  # a tensor in int8 or not: who gives it
        self._outputs: set[ir.Var] = set()
        self._depends: set[ir.Var] = set()  # on its results, computed outside
        self._later: set[int] = set()

    def pass_by(self, eqn: ir.Equation) -> None:
        # What depends on a result by way of another operation, no later call may read.
        if not (self._outputs | self._depends).isdisjoint(eqn.input_vars):
            self._depends.update(eqn.outputs)
            self._later.add(eqn.index)

    def join(self, last: int, call: SiteCall) -> bool:
        """Take in a call if it can be run with the others; an open sequence of none takes any."""
        chain = call.chain
        reads = {"x": (chain.site.site.operands[0], True)}
        if chain.residual is not None:
            reads["residual"] = (chain.residual, chain.residual_int8)
        # A chain may give a tensor as a float and in int8, so both say which.
        links = {name: self._given[read] for name, read in reads.items() if read in self._given}
        if call.residual_strides is not None:  # cut in between
            links.pop("residual", None)
        # What comes from outside has to be there before the whole sequence starts.
        outside = {var for name, (var, _) in reads.items() if name not in links}

        # Threads take samples through all calls, so these need one batch; and nothing outside may
        # have to run between two of them.
        if self._calls:
            same = self._batch() == self._graph.shape(chain.output)[0]
            if not (same and all(self._joins(each.call) for each in (call, *self._calls.values()))):
                return False
            if outside & (self._depends | self._outputs):
                return False

        position = len(self._calls)
        self._calls[last] = call
        self._links.append(links)
        self._outputs.add(chain.output)
        if chain.float_out:
            self._given[chain.output, False] = position
        # On another grid, a pool's, the integers are not those that a reader of the tensor expects.
        if chain.grid == chain.output:
            self._given[chain.output, True] = position
        return True

    def members(self) -> Members:
        return Members(tuple(self._calls), tuple(self._links), frozenset(self._later))

    def _batch(self) -> Any:
        first = next(iter(self._calls.values()))
        return self._graph.shape(first.chain.output)[0]


def in_order(equations: Sequence[ir.Equation], found: Sequence[Members],
             calls: Mapping[int, SiteCall]) -> list[ir.Equation]:  # fmt: skip
    """The equations with those of every sequence next to each other."""
    ordered = list(equations)
    for members in found:
        own = {k for last in members.chains for k in calls[last].chain.members}
        places = [place for place, eqn in enumerate(ordered) if eqn.index in own]
        start, end = places[0], places[-1] + 1
        between = ordered[start:end]
        # What lies between and reads none of their results comes before them, the rest behind.
        # Sorting is stable: equations of each of the three kinds keep their order.
        ordered[start:end] = sorted(
            between, key=lambda eqn: 1 if eqn.index in own else 2 * (eqn.index in members.later)
        )
    return ordered


class Sequenced:
    """Calls that run as one.

    Args:
      graph: the traced model.
      members: which.
      calls: by the index of their last equation.

    Attributes:
      results: those that are read outside: which call, and which of its results.
      links: for each call the operands that are results of earlier ones.
    """

    def __init__(self, graph: ir.Graph, members: Members, calls: Mapping[int, SiteCall]):
        self.members = members
        self.calls = [calls[last] for last in members.chains]
        # What the next call alone reads stays inside the sequence, and has no array of its own.
        self.results = [
            (position, k)
            for position, each in enumerate(self.calls)
            if self._is_read_outside(graph, position)
            for k in range(len(each.call.outputs))
        ]
        self.links = [self._links(position) for position in range(len(self.calls))]

    def operands(self, state: Evaluation) -> list[dict[str, jax.Array]]:
        """What every call reads, without what is linked."""
        pairs = zip(self.calls, self.members.links, strict=True)
        return [each.operands(state, links) for each, links in pairs]

    def keep(self, state: Evaluation, results: Sequence[jax.Array]) -> dict[ir.Var, jax.Array]:
        """The float results that others read; the int8 ones are kept, call by call."""
        by_call: dict[int, list[jax.Array]] = {}
        for (position, _), value in zip(self.results, results, strict=True):
            by_call.setdefault(position, []).append(value)
        values: dict[ir.Var, jax.Array] = {}
        for position, each in enumerate(self.calls):
            values |= each.keep(state, by_call.get(position, ()))
        return values

    def _is_read_outside(self, graph: ir.Graph, position: int) -> bool:
        output = self.calls[position].chain.output
        readers = {eqn.index for eqn in graph.consumers.get(output, ())}
        inside: set[int] = set()
        for each, links in zip(self.calls, self.members.links, strict=True):
            if links.get("x") == position:
                inside.add(each.chain.site.site.equation)
            if links.get("residual") == position:
                inside.update(each.chain.members)
        # Read outside in any form, or a result of the model.
        return output in graph.output_vars or not readers <= inside

    def _links(self, position: int) -> dict[str, tuple[int, int]]:
        """The operands that a call reads of others: whose they are, and which of its results."""
        found = {}
        for name, at in self.members.links[position].items():
            # The int8 form is the last result of a call, the float the first.
            as_int8 = name == "x" or self.calls[position].chain.residual_int8
            found[name] = (at, len(self.calls[at].call.outputs) - 1 if as_int8 else 0)
        return found
