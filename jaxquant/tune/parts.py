"""The parts of a model that run in int8 or in float, each by itself, in one compiled program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, loops
from jaxquant.plan import layout
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.plan import INT8
from jaxquant.run import both_forms
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.loops import arrays_of
from jaxquant.run.lowerings import Evaluation
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors


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


class Here(NamedTuple):
    """Where a choice is made.

    Attributes:
      program: the int8 program of the graph.
      qparams: its arrays, in a body those of one layer.
      reference: the values of the float model there; None where it does not run beside.
    """

    program: Program
    qparams: Mapping[str, Any]
    reference: evaluate.Environment | None

    @property
    def in_float(self) -> evaluate.Environment:
        """The values of the float model, which runs beside."""
        assert self.reference is not None
        return self.reference


class Outcome(NamedTuple):
    """What a choice at a part comes to.

    Attributes:
      values: those to go on with.
      seen: what was seen there, see `jaxquant.run.both_forms.AddsUp`; None for nothing.
    """

    values: Sequence[Any]
    seen: Any = None


class Seen(NamedTuple):
    """What was seen at parts, by their names, and of graphs, as `look` names it.

    In a scan over stacked weights with a leading axis for its layers; in another loop over all
    steps.
    """

    of: dict[str, Any]

    def plus(self, other: Seen) -> Seen:
        """What was seen here and in another step, of all that either shows."""
        both = {name: self.of[name].plus(other.of[name]) for name in self.of.keys() & other.of}
        return Seen({**self.of, **other.of, **both})

    def nothing(self) -> Seen:
        """What no step shows."""
        return Seen({name: each.nothing() for name, each in self.of.items()})


Value = Callable[[], Sequence[Any]]
Choose = Callable[[Here, Part, Value, Value], Outcome]
Look = Callable[[Here], Mapping[str, Any]]


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
    names = quantized - {part.name for part in parts}
    composites = program.model.composites.whole
    reading = binding.picks | binding.decisions | binding.forms.reads_int8
    for site in program.model.sites:
        if site.name not in names or site.inside or site.equation not in live & reading:
            continue
        whole = composites.get(site.equation)
        indices = (site.equation,) if whole is None else whole.members
        members = tuple(graph.equations[i] for i in indices)
        parts.append(Part(site.name, site.kind, members, site.operands))

    # What reads int8 and is neither a site nor in an epilogue.
    taken = {eqn.index for part in parts for eqn in part.members}
    for index in sorted(live & binding.forms.reads_int8 - taken):
        parts.append(Part("", "", (graph.equations[index],)))
    return tuple(sorted(parts, key=lambda part: part.end.index))


def evaluate_parts(
    parts: Parts,
    params: Any,
    qparams: Mapping[str, Any],
    inputs: Sequence[Any],
    choose: Choose,
    reference: evaluate.Environment | None = None,
    look: Look | None = None,
) -> tuple[evaluate.Environment, Seen]:
    """Evaluate the float model, with a choice at every part.

    Args:
      parts: of the int8 model.
      params, qparams: the arrays of both models.
      inputs: the flattened model inputs.
      choose: (where, part, float, int8) -> the values to go on with; the last two are functions
        without arguments that compute the part on the values so far.
      reference: the values of the float model, which then leads in loops and choices
        (`jaxquant.run.both_forms`); without it nothing may be seen there.
      look: shown each graph beside the float model; gives what was seen of it.

    Returns:
      The values that were gone on with; what was seen.
    """
    leaves = dict(zip(parts.program.graph.leaves, jax.tree.leaves(params), strict=True))
    here = Here(parts.program, qparams, reference)
    return _Mixing(choose, look).run(parts, here, leaves, inputs)


class _Mixing(NamedTuple):
    """The choices of one evaluation; see `evaluate_parts`."""

    choose: Choose
    look: Look | None

    def run(
        self, parts: Parts, here: Here, leaves: Mapping[ir.Var, Any], inputs: Sequence[Any]
    ) -> tuple[evaluate.Environment, Seen]:
        """Evaluate a graph, the model's own or a body's."""
        graph = parts.program.graph
        in_float = evaluate.float_table(graph.equations, fast_convolutions(graph))
        inner = {eqn.index for part in parts.own for eqn in part.members[:-1]}
        table = {index: lowering for index, lowering in in_float.items() if index not in inner}
        seen: dict[str, Any] = dict(self.look(here)) if self.look is not None else {}
        for part in parts.own:
            table[part.end.index] = self._choosing(here, part, in_float, seen)
        for index, bodies in parts.bodies.items():
            table[index] = self._looping(here, graph.equations[index], bodies, seen)
        # In a body beside the float form, integers are the float form's: both take the same way.
        if here.reference is not None and parts.program.model.body is not None:
            table = {
                index: both_forms.led(graph.equations[index], lowering, here.reference)
                for index, lowering in table.items()
            }
        return evaluate.evaluate(graph, leaves, inputs, table), Seen(seen)

    def _choosing(
        self,
        here: Here,
        part: Part,
        in_float: evaluate.Table[evaluate.Environment],
        seen: dict[str, Any],
    ) -> evaluate.Lowering[evaluate.Environment]:
        """The lowering of a part: its members run in float, in int8 or both, as is chosen."""
        program, qparams = here.program, here.qparams
        members = [eqn.index for eqn in part.members]
        on_float = {index: in_float[index] for index in members}
        # Each form in an environment of its own: what is computed inside is not seen outside.
        on_int8 = {i: program.lowerings[i] for i in members if i in program.lowerings}

        def choosing(env: evaluate.Environment) -> evaluate.Values:
            def as_float() -> Sequence[Any]:
                inner = env.fork()
                return results(evaluate.run(inner, on_float, inner))

            def as_int8() -> Sequence[Any]:
                inner = env.fork()
                quantized = QuantizedTensors(
                    inner, program.binding, qparams["tensors"], {}, varies=program.body.varies
                )
                return results(
                    evaluate.run(inner, on_int8, Evaluation(qparams, inner, quantized, sums={}))
                )

            def results(inner: evaluate.Environment) -> Sequence[Any]:
                return [inner.wide(var) for var in part.end.outputs]

            choice = self.choose(here, part, as_float, as_int8)
            if choice.seen is not None:
                seen[part.name] = choice.seen
            return dict(zip(part.end.outputs, choice.values, strict=True))

        return choosing

    def _looping(
        self, here: Here, eqn: ir.Equation, bodies: Sequence[Parts], seen: dict[str, Any]
    ) -> evaluate.Lowering[evaluate.Environment]:
        """The lowering of a loop or choice with parts inside."""

        def alone(env: evaluate.Environment) -> evaluate.Values:
            arrays = [arrays_of(body.program, here.qparams) for body in bodies]

            def step_of(number: int) -> loops.Step:
                def step(given: loops.Given) -> loops.Gives:
                    qparams = layout.joined(arrays[number][0], given.sliced or {})
                    return loops.Gives(self._step(bodies[number], given.values, qparams, None)[0])

                return step

            steps = [step_of(number) for number in range(len(bodies))]
            operands = [env.read(x) for x in eqn.inputs]
            found = loops.run(eqn, operands, steps, sliced=arrays[0][1])
            return dict(zip(eqn.outputs, found.results, strict=True))

        def beside(env: evaluate.Environment) -> evaluate.Values:
            forms = [both_forms.Form(body.program, self._both(body)) for body in bodies]
            results, inside = both_forms.run(
                eqn, forms, here.in_float, env, here.qparams, none=Seen({})
            )
            seen.update(inside.of)
            return dict(zip(eqn.outputs, results, strict=True))

        # One form where something is switched, both where they are compared.
        return alone if here.reference is None else beside

    def _both(
        self, body: Parts
    ) -> Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], both_forms.Both[Seen]]:
        def step(
            values: Sequence[Any], own: Sequence[Any], qparams: Mapping[str, Any]
        ) -> both_forms.Both[Seen]:
            reference = both_forms.float_body(body.program, values)
            wanted = [jnp.asarray(reference.read(x)) for x in body.program.graph.outputs]
            results, seen = self._step(body, own, qparams, reference)
            led = [
                got if jnp.issubdtype(want.dtype, jnp.floating) else want
                for got, want in zip(results, wanted, strict=True)
            ]
            return both_forms.Both(wanted, led, seen)

        return step

    def _step(
        self,
        body: Parts,
        values: Sequence[Any],
        qparams: Mapping[str, Any],
        reference: evaluate.Environment | None,
    ) -> tuple[list[jax.Array], Seen]:
        """One step of a body; without a reference what is seen there has nowhere to go."""
        here = Here(body.program, qparams, reference)
        env, seen = self.run(body, here, *body.program.model.root.split(values))
        assert reference is not None or not seen.of
        return [jnp.asarray(env.read(x)) for x in body.program.graph.outputs], seen


def _chain(graph: ir.Graph, site: Int8Site) -> tuple[ir.Equation, ...]:
    """The equations from a site to the end of its epilogue."""
    var, found = site.epilogue.output, []
    while True:
        eqn = graph.producer[var]
        found.append(eqn)
        if eqn.index == site.site.equation:
            return tuple(reversed(found))
        (var,) = {v for v in eqn.input_vars if not graph.static[v]}
