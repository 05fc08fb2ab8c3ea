"""A model of which each part runs in int8 or in float, or in both, as somebody chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, loops
from jaxquant.plan import layout
from jaxquant.run import both_forms
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.loops import arrays_of
from jaxquant.run.lowerings import Evaluation
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.tune.parts import Part, Parts


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
        # Only the last equation of a part stands for it: between them nothing is chosen.
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
                # A copy of the values: what one form computes inside, the other must not find.
                inner = env.fork()
                quantized = QuantizedTensors(
                    inner, program.binding, qparams["tensors"], {}, varies=program.body.varies
                )
                return results(
                    evaluate.run(inner, on_int8, Evaluation(qparams, inner, quantized, sums={}))
                )

            def results(inner: evaluate.Environment) -> Sequence[Any]:
                # Wide, as the next part would read it.
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
            # Weights of a scan lie by layer, so that each step has its own.
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
            # Integers of the float model go on: what int8 decides would lead the steps apart.
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
