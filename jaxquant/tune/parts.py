"""The parts of a model that run in int8 or in float, each by itself, in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.graph import evaluate, ir
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.plan import INT8
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.lowerings import Evaluation
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors

Value = Callable[[], Sequence[Any]]
Choose = Callable[["Part", Value, Value], Sequence[Any]]


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


def find_parts(program: Program) -> tuple[Part, ...]:
    """The parts of an int8 program, in evaluation order.

    Operations that only move int8 values are not among them: they have no error of their own.
    """
    graph, binding = program.graph, program.binding
    parts = [
        Part(s.site.name, s.site.kind, _chain(graph, s), s.site.operands, s) for s in binding.sites
    ]
    names = {s.name for s in program.plan.sites if s.status == INT8} - {u.name for u in parts}
    live = {eqn.index for eqn in program.equations}
    composites = program.model.composites.whole
    reading = binding.picks | binding.decisions | binding.forms.reads_int8
    for site in program.model.sites_of(program.mode.lookups):
        if site.name not in names or site.inside or site.equation not in live & reading:
            continue
        whole = composites.get(site.equation)
        indices = (site.equation,) if whole is None else whole.members
        members = tuple(graph.equations[i] for i in indices)
        parts.append(Part(site.name, site.kind, members, site.operands))
    taken = {eqn.index for part in parts for eqn in part.members}
    for index in sorted(live & binding.forms.reads_int8 - taken):
        parts.append(Part("", "", (graph.equations[index],)))
    return tuple(sorted(parts, key=lambda part: part.end.index))


def evaluate_parts(
    program: Program,
    parts: Sequence[Part],
    params: Any,
    qparams: Mapping[str, Any],
    inputs: Sequence[Any],
    choose: Choose,
) -> evaluate.Environment:
    """Evaluate the float model, with a choice at every part.

    Args:
      program: of the int8 model, each site of which shows its result (`program_by_site`).
      parts: its parts.
      params, qparams: the arrays of both models.
      inputs: the flattened model inputs.
      choose: (part, float, int8) -> the values to go on with; both are functions without arguments
        that compute the part on the values so far.

    Returns:
      The values that were gone on with.
    """
    graph = program.graph
    in_float = evaluate.float_table(graph.equations, fast_convolutions(graph))
    inner = {eqn.index for part in parts for eqn in part.members[:-1]}
    table = {index: lowering for index, lowering in in_float.items() if index not in inner}
    for part in parts:
        table[part.end.index] = _choosing(program, part, in_float, qparams, choose)
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    return evaluate.evaluate(graph, leaves, inputs, table)


def _choosing(
    program: Program,
    part: Part,
    in_float: evaluate.Table[evaluate.Environment],
    qparams: Mapping[str, Any],
    choose: Choose,
) -> evaluate.Lowering[evaluate.Environment]:
    """The lowering of a part: its members run in float, in int8 or both, as is chosen."""
    members = [eqn.index for eqn in part.members]
    on_float = {index: in_float[index] for index in members}
    on_int8 = {i: program.lowerings[i] for i in members if i in program.lowerings}

    def choosing(env: evaluate.Environment) -> evaluate.Values:
        def as_float() -> Sequence[Any]:
            inner = env.fork()
            return results(evaluate.run(inner, on_float, inner))

        def as_int8() -> Sequence[Any]:
            inner = env.fork()
            quantized = QuantizedTensors(inner, program.binding, qparams["tensors"], {})
            return results(evaluate.run(inner, on_int8, Evaluation(qparams, inner, quantized)))

        def results(inner: evaluate.Environment) -> Sequence[Any]:
            return [inner.wide(var) for var in part.end.outputs]

        return dict(zip(part.end.outputs, choose(part, as_float, as_int8), strict=True))

    return choosing


def _chain(graph: ir.Graph, site: Int8Site) -> tuple[ir.Equation, ...]:
    """The equations from a site to the end of its epilogue."""
    var, found = site.epilogue.output, []
    while True:
        eqn = graph.producer[var]
        found.append(eqn)
        if eqn.index == site.site.equation:
            return tuple(reversed(found))
        (var,) = {v for v in eqn.input_vars if not graph.static[v]}
