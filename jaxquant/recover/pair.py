"""A graph in both forms: what its sites are off, in one evaluation, inside loops and choices too.

A loop with int8 sites inside runs once, its float body and its int8 body together, see
`jaxquant.run.both_forms`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir
from jaxquant.graph.adaptive import is_adaptive
from jaxquant.graph.positions import RealIn, all_entries
from jaxquant.plan.binding import Int8Site
from jaxquant.recover.activation import find_activation
from jaxquant.recover.added import seen_at
from jaxquant.recover.shift import add_powers, add_shifts, compare_outputs, powers, without_padding
from jaxquant.run import both_forms
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.program import Program


class Asked(NamedTuple):
    """What is to be done behind a site, each a truth value.

    Attributes:
      correct: take the site's shift away before going on.
      alone: go on with the float model's value.
      real: gives which entries of a tensor belong to no padding; others are not compared.
    """

    correct: jax.Array
    alone: jax.Array
    real: RealIn = all_entries


class Seen(NamedTuple):
    """What was seen of sites, by their names.

    The arrays have a leading axis for each scan over stacked weights around a site; in other loops
    they are summed over the steps, with a unit of 0 where there was no step.

    Attributes:
      powers: what `jaxquant.recover.shift.powers` gives, [3].
      shifts: of the sites whose bias is corrected, the first three of a `Shift`, [3, C], in the
        unit that is in `powers`.
    """

    powers: dict[str, jax.Array]
    shifts: dict[str, jax.Array]

    def plus(self, other: Seen) -> Seen:
        """What was seen here and in another step, of the sites that either shows."""
        both, shifts = {**other.powers, **self.powers}, {**other.shifts, **self.shifts}
        for name in self.powers.keys() & other.powers.keys():
            # A part that did not see a site adds nothing to it.
            both[name] = add_powers(self.powers[name], other.powers[name])
        for name in self.shifts.keys() & other.shifts.keys():
            units = self.powers[name][..., 2], other.powers[name][..., 2]
            shifts[name] = add_shifts(self.shifts[name], units[0], other.shifts[name], units[1])
        return Seen(both, shifts)

    def nothing(self) -> Seen:
        """Zeros: a unit of 0 is of nothing seen."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self)


class Pair:
    """A graph, the model's own or a body's, in float and in int8.

    Attributes:
      program: its int8 form.
      tensors: by the name of each site with a float output, the tensor that it is compared at.
      named: the same, by the tensor.
      activations: what is behind each int8 site that has parameters.
      ends: the equations whose results are measured.
      bodies: the bodies with int8 sites inside, by the index of the equation that holds them.
    """

    def __init__(self, program: Program):
        self.program = program
        graph = program.graph
        ends = {each.site.name: _end_of(program, each) for each in program.binding.sites}
        # Compared where the epilogue ends: what lies within it exists in no int8 model.
        self.tensors = {
            site.name: ends.get(site.name, site.output)
            for site in program.model.sites
            if site.output is not None and is_float(graph.dtype(site.output))
        }
        self.activations = {
            s.site.name: find_activation(graph, s.epilogue.output)
            for s in program.binding.sites
            if s.site.name in program.slots and program.mode.integer and not s.site.is_lookup
        }

        self.ends = _ends(program)
        # The same by tensor, for the walk that meets tensors and not sites.
        self.named = {var: name for name, var in self.tensors.items() if var is not None}
        self.bodies = {
            index: tuple(Pair(body) for body in bodies) for index, bodies in program.bodies.items()
        }

    def walk(self) -> Iterator[Pair]:
        """Itself and the bodies inside."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.walk()

    @property
    def with_error(self) -> set[str]:
        """The int8 sites of this graph that have an error of their own."""
        # Sites that only move integers have no error of their own.
        produced = {v for i in self.ends for v in self.program.graph.equations[i].outputs}
        return {name for var, name in self.named.items() if var in produced}

    @property
    def corrected(self) -> set[str]:
        """The sites of this graph whose bias takes their shift away."""
        return self.activations.keys() & self.program.plan.recovered_by("bias_correction")

    def run(
        self,
        reference: evaluate.Environment,
        qparams: Mapping[str, Any],
        inputs: Sequence[Any],
        asked: Asked,
        leaves: Mapping[ir.Var, Any] | None = None,
    ) -> tuple[evaluate.Environment, Seen]:
        """Run the int8 form beside the values of the float one.

        Args:
          reference: the values of the float form.
          qparams: the arrays of the int8 form.
          inputs: of the int8 form.
          asked: what is done behind each site.
          leaves: of a body, those of its int8 form.

        Returns:
          The values of the int8 form; what was seen.
        """
        look = _Beside(self, reference, asked)
        # A bias is corrected before what reads the sum sees it; loops hold both forms of their
        # bodies, so they are replaced whole.
        program = self.program.hooked(look.corrected)
        program = program.replacing({index: look.looped(index) for index in self.bodies})
        # Integers of a body, its counters and tests, are the float form's: both take the same way.
        if program.model.body is not None:
            equations, lowerings = program.graph.equations, program.lowerings.items()
            program = program.replacing(
                {k: both_forms.led(equations[k], each, reference) for k, each in lowerings}
            )

        # Last, so that what is measured at an end is what the hooks before have made of it.
        ends = {index: look.followed(program.lowerings[index]) for index in self.ends}
        quantized = program.replacing(ends).run(qparams, inputs, leaves)
        look.measure_rest(quantized)
        return quantized, Seen(look.powers, look.shifts)

    def step(
        self, values: Sequence[Any], own: Sequence[Any], qparams: Mapping[str, Any], asked: Asked
    ) -> both_forms.Both[Seen]:
        """One step of a body.

        Args:
          values: of its arguments in the float model.
          own: those in the int8 model; None where they are not read.
          qparams: the arrays of its sites, of one layer.
          asked: what is done behind each site.
        """
        graph = self.program.graph
        # The float body once for both: its values lead the int8 form.
        reference = both_forms.float_body(self.program, values)
        leaves, inputs = self.program.model.root.split(own)
        quantized, seen = self.run(reference, qparams, inputs, asked, leaves)
        wanted = [jnp.asarray(reference.read(x)) for x in graph.outputs]
        # The next step reads the int8 form's carry, or with `alone` the float one's.
        results = [
            jnp.where(asked.alone, want, jnp.asarray(quantized.read(x)))
            if is_float(graph.dtype(x))
            else want
            for want, x in zip(wanted, graph.outputs, strict=True)
        ]
        return both_forms.Both(wanted, results, seen)


class _Beside:
    """The hooks by which one evaluation of an int8 form is compared with the float one.

    Args:
      pair: both forms.
      reference: the values of the float form.
      asked: what is done behind each site.

    Attributes:
      powers, shifts: what was seen so far, as `Seen` has it.
    """

    def __init__(self, pair: Pair, reference: evaluate.Environment, asked: Asked):
        self.powers: dict[str, jax.Array] = {}
        self.shifts: dict[str, jax.Array] = {}
        self._pair, self._reference, self._asked = pair, reference, asked
        self._graph = pair.program.graph
        self._correctable = pair.corrected

    def corrected(self, site: Int8Site, lowering: Lowering) -> Lowering:
        """The site's lowering, compared with the float model, its shift taken away."""
        name, epilogue = site.site.name, site.epilogue
        activation = self._pair.activations.get(name)
        if activation is None:
            return lowering

        def correcting(state: Evaluation) -> evaluate.Values:
            # Before its shift is taken away: what is reported is the site's own error.
            value = lowering(state)[epilogue.output]
            compared = compare_outputs(
                epilogue, activation, self._reference, value, self._real(epilogue.output)
            )
            self.powers[name] = compared.powers
            if name not in self._correctable:
                return {epilogue.output: value}
            self.shifts[name] = compared.shift
            # Whether it is taken away is known as the program runs, so that one compiled
            # comparison serves the correction and the look at its result.
            step = jnp.where(self._asked.correct, compared.mean, 0)
            return {epilogue.output: value + epilogue.channels.spread(step, value.ndim)}

        return correcting

    def looped(self, index: int) -> Lowering:
        """The lowering of a loop or choice that runs both forms of its bodies."""
        eqn = self._graph.equations[index]

        def looping(state: Evaluation) -> evaluate.Values:
            forms = [
                both_forms.Form(body.program, functools.partial(body.step, asked=self._asked))
                # The bodies are compared as the graph around them is, and so on inwards.
                for body in self._pair.bodies[index]
            ]
            results, seen = both_forms.run(
                eqn, forms, self._reference, state.env, state.qparams, none=Seen({}, {})
            )
            self.powers.update(seen.powers)
            self.shifts.update(seen.shifts)
            if is_adaptive(self._pair.bodies[index][0].program.model.root):
                # Its steps were compared one by one; what comes out is of the steps that it takes.
                return self._pair.program.lowerings[index](state)
            return dict(zip(eqn.outputs, results, strict=True))

        return looping

    def followed(self, lowering: Lowering) -> Lowering:
        """A lowering whose values are measured, and those of the float model taken for them."""

        def following(state: Evaluation) -> evaluate.Values:
            return {var: self._measured(var, value) for var, value in lowering(state).items()}

        return following

    def measure_rest(self, quantized: evaluate.Environment) -> None:
        """Measure the tensors that no site gives, such as the inputs, as they are read."""
        for name, var in self._pair.tensors.items():
            if var is not None and var in quantized and name not in self.powers:
                self.powers[name] = powers(self._wanted(var), quantized.wide(var))

    def _measured(self, var: ir.Var, value: Any) -> Any:
        if not is_float(self._graph.dtype(var)):
            return value
        name = self._pair.named.get(var, "")
        # A site was measured before its shift was taken away: that is its own error.
        if name and name not in self.powers:
            self.powers[name] = powers(self._wanted(var), value)
        # With `alone` a site reads what the float model would give it.
        in_float = self._reference.wide(var).astype(value.dtype)
        return jnp.where(self._asked.alone, in_float, value)

    def _wanted(self, var: ir.Var) -> jax.Array:
        """What the float form gives, to be compared."""
        return without_padding(self._reference.read(var), self._real(var))

    def _real(self, var: ir.Var) -> jax.Array | None:
        return self._asked.real(self._pair.program.model, var)


def _ends(program: Program) -> list[int]:
    """The last equations of what a program computes of int8 tensors, beside what moves integers."""
    graph, binding = program.graph, program.binding
    wholes = {last: set(c.members) for last, c in program.model.composites.whole.items()}
    reading = binding.forms.reads_int8 | binding.picks
    last_ones = {last for last, members in wholes.items() if members & reading}
    inner = {index for last, members in wholes.items() for index in members - {last}}
    # What runs in no lowering (absorbed, or never asked for) has no end.
    sites_end = {graph.producer[_end_of(program, each)].index for each in binding.sites}
    found = (sites_end | (reading - inner) | last_ones) & program.lowerings.keys()
    return sorted(found | program.bodies.keys())


def _end_of(program: Program, int8_site: Int8Site) -> ir.Var:
    """The tensor at which an int8 site is compared."""
    site = int8_site.site
    # Of weights alone the bias stays an addition of the model's, and takes the mean error away.
    if program.mode.integer or site.is_lookup or site.stored_weight is None:
        return int8_site.epilogue.output
    return seen_at(program.model, site)


def is_float(dtype: Any) -> bool:
    """Whether a tensor of this dtype holds floats."""
    return bool(jnp.issubdtype(dtype, jnp.floating))
