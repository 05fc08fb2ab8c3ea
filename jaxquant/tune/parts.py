"""The parts of a model that run in int8 or in float, each by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from jaxquant.graph import ir
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.plan import INT8
from jaxquant.run.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One int8 site with what its epilogue absorbs.

    Attributes:
      name: of the site; "" for an elementwise equation that reads int8 and is no site of its own.
      kind: of the site.
      members: its equations, in order; what the last one gives is what others read.
      operands: the tensors that it reads.
      site: the site with its epilogue, where it accumulates or has a weight.
    """

    name: str
    kind: str
    members: tuple[ir.Equation, ...]
    operands: tuple[ir.Var, ...] = ()
    site: Int8Site | None = None

    @property
    def end(self) -> ir.Equation:
        return self.members[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """A graph cut into parts.

    Attributes:
      program: its int8 form, each site of which shows its result (`program_by_site`).
      own: the parts of the graph itself, in evaluation order.
      bodies: those of its loops and choices, by the index of the equation that holds them.
    """

    program: Program
    own: tuple[Part, ...]
    bodies: Mapping[int, tuple[Parts, ...]]

    def walk(self) -> Iterator[Parts]:
        """Itself and the bodies inside."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.walk()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all its sites, in evaluation order."""
        found = {part.name for parts in self.walk() for part in parts.own}
        return tuple(site.name for site in self.program.whole_plan.sites if site.name in found)


def find_parts(program: Program) -> Parts:
    """The parts of an int8 program, with those in its loops and choices.

    Operations that only move int8 values are not among them: they have no error of their own.
    """
    bodies = {index: tuple(map(find_parts, bodies)) for index, bodies in program.bodies.items()}
    return Parts(program, _own_parts(program), bodies)


def _own_parts(program: Program) -> tuple[Part, ...]:
    """The parts of a program's own graph, in evaluation order."""
    graph, binding = program.graph, program.binding
    live = {eqn.index for eqn in program.equations}  # a derivative leaves others behind
    parts = [
        Part(each.site.name, each.site.kind, _chain(graph, each), each.site.operands, each)
        for each in binding.sites
        if graph.producer[each.epilogue.output].index in live
    ]

    # Sites without an accumulator or a weight, as far as they compute: what moves has no error.
    quantized = {site.name for site in program.plan.sites if site.status == INT8}
    # What accumulates is a part already.
    names = quantized - {part.name for part in parts}
    composites = program.model.composites.whole
    absorbed = {eqn.index for part in parts for eqn in part.members}
    reading = binding.picks | binding.decisions | binding.forms.reads_int8
    for site in program.model.sites:
        if site.name not in names or site.inside or site.equation not in live & reading:
            continue
        whole = composites.get(site.equation)
        indices = (site.equation,) if whole is None else whole.members
        # A bias before a softmax could be its mask; where a dot absorbs it, it is the dot's.
        members = tuple(graph.equations[i] for i in indices if i not in absorbed)
        parts.append(Part(site.name, site.kind, members, site.operands))

    # What reads int8 and is neither a site nor in an epilogue.
    taken = {eqn.index for part in parts for eqn in part.members}
    for index in sorted(live & binding.forms.reads_int8 - taken):
        parts.append(Part("", "", (graph.equations[index],)))
    return tuple(sorted(parts, key=lambda part: part.end.index))


def _chain(graph: ir.Graph, site: Int8Site) -> tuple[ir.Equation, ...]:
    """The equations from a site to the end of its epilogue."""
    var, found = site.epilogue.output, []
    while True:
        eqn = graph.producer[var]
        found.append(eqn)
        # From the end back to the site: an epilogue is a chain.
        if eqn.index == site.site.equation:
            return tuple(reversed(found))
        # One operand alone is no constant.
        (var,) = {v for v in eqn.input_vars if not graph.static[v]}
