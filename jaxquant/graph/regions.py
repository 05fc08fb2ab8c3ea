"""Regions: a model's graph, and the bodies of its loops and branches as graphs of their own.

A body's inputs and outputs are bound to the equation that holds it, so that whoever walks the model
goes from a tensor inside to the one outside that it comes from, and back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.graph import ir, kinds
from jaxquant.graph.composites import Composites
from jaxquant.graph.marks import mark_of
from jaxquant.graph.trace import trace_body
from jaxquant.jax_shim import jaxprs

CONTROL_FLOW = frozenset({"scan", "while", "cond"})


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A graph that runs as a whole: the model's own, or a body that an equation holds.

    Attributes:
      graph: what it computes.
      holder: the region that the equation is in; None for the model's own.
      equation: the one that holds the body; None for the model's own.
      number: which of the equation's bodies it is.
      arguments: the graph's tensors that the operands become, in their order: of one that is
        computed from parameters a leaf of the graph, of another an input.
      key: the equation's parameter that holds the body: "jaxpr" of a scan, "cond_jaxpr" and
        "body_jaxpr" of a while loop, "branches" of a choice.
      operands: for each argument the atom of the holder's graph that it reads, by a loop
        in the first step; None where that is not known.
      scanned: the positions of the arguments that read one slice of their operand each step.
      carries: position of an argument -> position of the output that it reads in the next step.
      results: for each output of the graph the position of the equation's result that it ends in,
        the last step's or all of them stacked; None where it ends in none.
    """

    graph: ir.Graph
    holder: Region | None = None
    equation: ir.Equation | None = None
    number: int = 0
    key: str = ""
    arguments: tuple[ir.Var, ...] = ()
    operands: tuple[ir.Atom | None, ...] = ()
    scanned: frozenset[int] = frozenset()
    carries: Mapping[int, int] = dataclasses.field(default_factory=dict)
    results: tuple[int | None, ...] = ()

    @property
    def inside(self) -> tuple[str, ...]:
        """The primitives that hold the region, outermost first; () for the model's own."""
        if self.holder is None or self.equation is None:
            return ()
        return (*self.holder.inside, self.equation.name)

    @property
    def location(self) -> tuple[int, ...]:
        """The index of the equation that holds it and its number there, outermost first."""
        if self.holder is None or self.equation is None:
            return ()
        return (*self.holder.location, self.equation.index, self.number)

    @functools.cached_property
    def segment(self) -> str:
        """Which layers a scan goes over that was cut, "[4:12]"; "" outside of such a scan."""
        if self.holder is None or self.equation is None or self.holder.segment:
            return "" if self.holder is None else self.holder.segment
        graph = self.holder.graph
        read = [self.operands[place] for place in self.scanned]
        # The scan was cut if the parameters that it goes over have marks of as many layers.
        marks = [
            mark_of(graph.paths[x], self.equation.params["length"])
            for x in read
            if isinstance(x, int) and x in graph.leaves
        ]
        return next(filter(None, marks), "")

    @functools.cached_property
    def composites(self) -> Composites:
        """What JAX writes as several equations."""
        return Composites(self.graph)

    @functools.cached_property
    def _bodies(self) -> dict[int, tuple[Region, ...]]:
        return {}

    def bodies(self, eqn: ir.Equation) -> tuple[Region, ...]:
        """The bodies that an equation of this region holds; () where it holds none."""
        # Bound once: the bodies' tensors are known by the graph that they are in.
        if eqn.index not in self._bodies:
            found = enumerate(jaxprs.sub_bodies(dict(eqn.params)))
            self._bodies[eqn.index] = tuple(
                _bound(self, eqn, number, key, jaxpr, consts)
                for number, (key, jaxpr, consts) in found
            )
        return self._bodies[eqn.index]

    @functools.cached_property
    def _weighty(self) -> frozenset[ir.Var]:
        """The leaves that weights are made of, those of the bodies inside too."""
        graph, read = self.graph, set[ir.Var]()
        for eqn in graph.equations:
            # Static equations make weights, and read none.
            if eqn.outputs and graph.static[eqn.outputs[0]]:
                continue
            if eqn.index in graph.contractions:
                read.update(var for var in eqn.input_vars if graph.static[var])
            elif kinds.is_lookup(graph, eqn):
                read.add(eqn.input_vars[0])
            else:
                for body in self.bodies(eqn):
                    # What a body inside makes weights of is a weight of the body around it.
                    pairs = zip(body.arguments, body.operands, strict=True)
                    read.update(x for v, x in pairs if v in body._weighty and isinstance(x, int))
        sources = {source for var in read for source in graph.sources(var)}
        return frozenset(sources.intersection(graph.leaves))

    def split(self, values: Sequence[Any]) -> tuple[dict[ir.Var, Any], list[Any]]:
        """The values of the arguments of a body as those of its leaves and of its inputs.

        Those that no step reads in float are None, and no leaves: the weights that are integers.
        """
        # In two dicts, since leaves have paths and inputs have places.
        given = dict(zip(self.arguments, values, strict=True))
        leaves = {var: given[var] for var in self.graph.leaves if given[var] is not None}
        return leaves, [given[var] for var in self.graph.inputs]

    def walk(self) -> Iterator[Region]:
        """The region, and the bodies of the loops and choices in it that depend on the inputs."""
        yield self
        for eqn in self.graph.equations:
            is_static = bool(eqn.outputs) and self.graph.static[eqn.outputs[0]]
            if eqn.name in CONTROL_FLOW and not is_static:
                for body in self.bodies(eqn):
                    yield from body.walk()


class _Ends(NamedTuple):
    """How a body is bound to its equation: the attributes of a `Region` of these names."""

    operands: tuple[ir.Atom | None, ...]
    scanned: frozenset[int]
    carries: dict[int, int]
    results: tuple[int | None, ...]


def _ends_of(eqn: ir.Equation, key: str, arguments: int, outputs: int) -> _Ends:
    """What JAX's loops mean: which operand is which argument, and which output which result.

    Args:
      eqn: the equation.
      key: its parameter that holds the body.
      arguments, outputs: how many the body has.
    """
    operands: tuple[ir.Atom | None, ...] = (None,) * arguments
    scanned: frozenset[int] = frozenset()
    carries: dict[int, int] = {}
    results: tuple[int | None, ...] = tuple(range(outputs))
    if eqn.name == "scan":
        constants, carried = jaxprs.scan_counts(eqn.params)
        operands = eqn.inputs
        scanned = frozenset(range(constants + carried, arguments))
        carries = {constants + k: k for k in range(carried)}
    elif eqn.name == "while":
        of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        start = eqn.inputs[of_test + of_body :]
        # The test reads the carry, and gives nothing but when to stop.
        if key == "cond_jaxpr":
            return _Ends((*eqn.inputs[:of_test], *start), scanned, carries, (None,) * outputs)
        operands = (*eqn.inputs[of_test : of_test + of_body], *start)
        carries = {of_body + k: k for k in range(outputs)}
    elif eqn.name == "cond":
        # The first operand chooses the branch.
        operands = eqn.inputs[1:]
    # Another equation with a body that takes what it reads.
    elif len(eqn.inputs) == arguments:
        operands = eqn.inputs
    if outputs != len(eqn.outputs):
        results = (None,) * outputs  # an equation of which is not known what its body gives
    return _Ends(operands, scanned, carries, results)


def _bound(
    holder: Region, eqn: ir.Equation, number: int, key: str, jaxpr: Any, consts: Any
) -> Region:
    """A body, its inputs and outputs bound by what its equation means."""
    ends = _ends_of(eqn, key, len(jaxpr.invars), len(jaxpr.outvars))
    operands, scanned, carries, _ = ends

    constant = [  # what every step reads alike
        # A carry is a parameter in the first step at most.
        None if k in carries or (key == "cond_jaxpr" and k >= eqn.params["cond_nconsts"]) else atom
        for k, atom in enumerate(operands)
    ]

    def traced(constant: Sequence[ir.Atom | None]) -> Region:
        graph, arguments = trace_body(holder.graph, eqn, jaxpr, consts, constant)
        return Region(graph, holder, eqn, number, key, arguments, *ends)

    found = traced(constant)
    if {found.arguments[k] for k in scanned} & found._weighty:
        return found
    # Stacked biases or tables alone make no layers: they are tensors like any other.
    without = [None if k in scanned else atom for k, atom in enumerate(constant)]
    return found if without == constant else traced(without)
