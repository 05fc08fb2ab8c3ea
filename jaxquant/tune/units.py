"""The parts of a model that run in int8 or in float, each by itself, in one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.graph import composites, evaluate, ir, sites
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.plan import INT8
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors

Value = Callable[[], Sequence[Any]]
Choose = Callable[["Unit", Value, Value], Sequence[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Unit:
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


def find_units(program: Program) -> tuple[Unit, ...]:
    """The units of an int8 program, in evaluation order.

    Operations that only move int8 values are not among them: they have no error of their own.
    """
    graph, binding = program.graph, program.binding
    units = [
        Unit(s.site.name, s.site.kind, _chain(graph, s), s.site.operands, s) for s in binding.sites
    ]
    names = {s.name for s in program.plan.sites if s.status == INT8} - {u.name for u in units}
    live = {eqn.index for eqn in program.equations}
    softmaxes = composites.find_softmax(graph)
    reading = binding.selects | binding.decisions | binding.forms.reads_int8
    for site in sites.find_sites(graph, lookups=program.mode.lookups):
        if site.name not in names or site.inside or site.equation not in live & reading:
            continue
        indices: tuple[int, ...] = (site.equation,)
        if site.kind == "softmax":
            indices = softmaxes[site.equation].members
        members = tuple(graph.equations[i] for i in indices)
        units.append(Unit(site.name, site.kind, members, site.operands))
    taken = {eqn.index for unit in units for eqn in unit.members}
    for index in sorted(live & binding.forms.reads_int8 - taken):
        units.append(Unit("", "", (graph.equations[index],)))
    return tuple(sorted(units, key=lambda unit: unit.end.index))


def walk(
    program: Program,
    units: Sequence[Unit],
    params: Any,
    qparams: Mapping[str, Any],
    inputs: Sequence[Any],
    choose: Choose,
) -> evaluate.Environment:
    """Evaluate the float model, with a choice at every unit.

    Args:
      program: of the int8 model, each site of which shows its result (`program_by_site`).
      units: its units.
      params, qparams: the arrays of both models.
      inputs: the flattened model inputs.
      choose: (unit, float, int8) -> the values to go on with; both are functions without arguments
        that compute the unit on the values so far.

    Returns:
      The values that were gone on with.
    """
    graph = program.graph
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    env = evaluate.Environment(graph, leaves, inputs)
    by_end = {unit.end.index: unit for unit in units}
    inner = {eqn.index for unit in units for eqn in unit.members[:-1]}
    fast = fast_convolutions(graph)

    def rule(eqn: ir.Equation) -> Sequence[Any]:
        if eqn.index in inner:
            return [None] * len(eqn.outputs)
        if eqn.index not in by_end:
            return fast.get(eqn.index, evaluate.apply)(env, eqn)
        unit = by_end[eqn.index]
        return choose(
            unit,
            functools.partial(_as_float, env, unit, fast),
            functools.partial(_as_int8, program, qparams, env, unit),
        )

    return evaluate.run(env, graph.equations, rule)


def _as_float(
    env: evaluate.Environment, unit: Unit, fast: Mapping[int, evaluate.Replace]
) -> Sequence[Any]:
    inner = env.fork()

    def rule(eqn: ir.Equation) -> Sequence[Any]:
        return fast.get(eqn.index, evaluate.apply)(inner, eqn)

    evaluate.run(inner, unit.members, rule)
    return [inner.wide(var) for var in unit.end.outputs]


def _as_int8(
    program: Program, qparams: Mapping[str, Any], env: evaluate.Environment, unit: Unit
) -> Sequence[Any]:
    inner = env.fork()
    quantized = QuantizedTensors(inner, program.binding, qparams["tensors"], {})
    live = {eqn.index for eqn in program.equations}
    members = [eqn for eqn in unit.members if eqn.index in live]
    rule = functools.partial(program.apply, qparams, inner, quantized, ahead={})
    evaluate.run(inner, members, rule)
    return [inner.wide(var) for var in unit.end.outputs]


def _chain(graph: ir.Graph, site: Int8Site) -> tuple[ir.Equation, ...]:
    """The equations from a site to the end of its epilogue."""
    var, found = site.epilogue.output, []
    while True:
        eqn = graph.producer[var]
        found.append(eqn)
        if eqn.index == site.site.equation:
            return tuple(reversed(found))
        (var,) = {v for v in eqn.input_vars if not graph.static[v]}
