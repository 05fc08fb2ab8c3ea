"""Run a loop or choice in two forms at once, its float body and another one of it in each step.

Each form has a carry of its own.  The float form leads: it says how many steps a `while` takes and
which branch a choice, and its integers (an index, a token that was chosen) the other form reads
too, so that both write the same text.  In a loop that takes as many steps as its floats ask for the
other form begins each step with the float form's carry: by itself it would take other steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, loops
from jaxquant.graph.adaptive import is_adaptive
from jaxquant.plan import layout
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.loops import BodyProgram, arrays_of


class AddsUp(Protocol):
    """What is seen in a step and adds up over steps: a pytree of arrays.

    In a scan over stacked weights nothing is added: there is one for each layer, along a leading
    axis.
    """

    def plus(self, other: Self) -> Self:
        """What was seen here and in another step, which may have seen less."""
        ...

    def nothing(self) -> Self:
        """What no step shows, in arrays of these shapes."""
        ...


Seen = TypeVar("Seen", bound=AddsUp)


class Both(NamedTuple, Generic[Seen]):
    """What a step gives.

    Attributes:
      in_float: the results of the float body.
      other: the results of its other form.
      seen: what was seen.
    """

    in_float: list[jax.Array]
    other: list[jax.Array]
    seen: Seen


class Form(NamedTuple, Generic[Seen]):
    """A body in two forms.

    Attributes:
      body: its int8 program, which tells what of `qparams` it reads.
      step: (values of the arguments in the float model, values in the other form or None where
        these are not read, `qparams` of one layer) -> what a step gives.
    """

    body: BodyProgram
    step: Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], Both[Seen]]


class _Operands(NamedTuple):
    """What the other form of a body reads, by the positions of its arguments.

    Attributes:
      fixed: what every step reads alike.
      start: what the first step reads in place of a carry.
      sliced: what each step reads a slice of.
    """

    fixed: dict[int, Any]
    start: dict[int, Any]
    sliced: dict[int, Any]


def run(
    eqn: ir.Equation,
    forms: Sequence[Form[Seen]],
    reference: evaluate.Environment,
    env: evaluate.Environment,
    qparams: Mapping[str, Any],
    none: Seen,
) -> tuple[list[Any], Seen]:
    """Run a loop or choice in both forms at once.

    The float form is the loop that JAX sees; the other form's carry is kept beside its own.

    Args:
      eqn: the equation.
      forms: of what it holds.
      reference: the values of the float model around it.
      env: those of the other form around it.
      qparams: the arrays of the int8 model around it.
      none: what is seen of no site at all.

    Returns:
      The results of the other form, of an adaptive loop those of its last step; what was seen.
    """
    arrays = [arrays_of(form.body, qparams) for form in forms]
    every, stacked = zip(*arrays, strict=True)
    pair = _Pair(eqn, forms, every, [_operands(form.body, env) for form in forms], none)
    found = loops.run(
        eqn,
        [reference.read(x) for x in eqn.inputs],
        [pair.step_of(number) for number in range(len(forms))],
        # A scan has one body; of the branches of a choice nothing is sliced or carried.
        sliced=(stacked[0], pair.operands[0].sliced),
        kept=(pair.operands[0].start, pair.unseen()),
    )
    return pair.results(found)


@dataclasses.dataclass(frozen=True)
class _Pair(Generic[Seen]):
    """A loop or choice whose steps run in both forms.

    Attributes:
      eqn, forms, none: as of `run`.
      every: the arrays that all steps of a body read, by the number of the body.
      operands: what the other form of a body reads, likewise.
    """

    eqn: ir.Equation
    forms: Sequence[Form[Seen]]
    every: Sequence[Mapping[str, Any]]
    operands: Sequence[_Operands]
    none: Seen

    @property
    def is_choice(self) -> bool:
        return self.eqn.name == "cond"

    @property
    def is_layered(self) -> bool:
        """Whether it is a scan over stacked weights, each step of which is a layer."""
        return self.forms[0].body.model.layers is not None

    @property
    def is_adaptive(self) -> bool:
        """Whether floats tell how many steps a loop takes."""
        return is_adaptive(self.forms[0].body.model.root)

    @property
    def carries(self) -> Mapping[int, int]:
        """The result of a step that each carried argument of the next one is."""
        return self.forms[0].body.model.root.carries

    def unseen(self) -> Seen:
        """What is seen before the first step.

        What is seen of layers the scan stacks; of other steps it is summed in the carry, which has
        to have its shapes before the first step.
        """
        seen = self.none
        if not self.is_layered:
            for form, given, every in zip(self.forms, self.operands, self.every, strict=True):
                seen = seen.plus(_unseen(form, given, every))
        return seen

    def step_of(self, number: int) -> loops.Step:
        """The step of one of the bodies."""
        form, every, fixed = self.forms[number], self.every[number], self.operands[number].fixed

        def step(given: loops.Given) -> loops.Gives:
            # The arguments of the other form, in their order: what is fixed, carried and sliced.
            carry, sums = given.kept
            if self.is_adaptive:
                carry = {place: given.values[place] for place in carry}
            layer, slices = given.sliced or ({}, {})
            places = {**fixed, **carry, **slices}
            own = [places[place] for place in range(len(places))]
            return self._gives(form.step(given.values, own, layout.joined(every, layer)), sums)

        return step

    def _gives(self, both: Both[Seen], sums: Seen) -> loops.Gives:
        # A choice has no carry; both of its results go on.
        if self.is_choice:
            return loops.Gives(both.in_float, None, (both.other, sums.plus(both.seen)))
        carry = {place: both.other[output] for place, output in self.carries.items()}
        others = [x for k, x in enumerate(both.other) if k not in self.carries.values()]
        if self.is_layered:
            return loops.Gives(both.in_float, (others, both.seen), (carry, sums))
        return loops.Gives(both.in_float, (others, self.none), (carry, sums.plus(both.seen)))

    def results(self, found: loops.Gives) -> tuple[list[Any], Seen]:
        """The results of the other form in the order of the equation; what was seen."""
        kept, sums = found.kept
        if self.is_choice:
            return list(kept), sums
        # Its last carry lies by the positions of arguments, its stacks in the order of the rest.
        results = {output: kept[place] for place, output in self.carries.items()}
        others, layers = found.stacked or ([], self.none)
        rest = [place for place in range(len(self.eqn.outputs)) if place not in results]
        results |= dict(zip(rest, others, strict=True))
        in_order = [results[place] for place in range(len(self.eqn.outputs))]
        return in_order, layers if self.is_layered else sums


def float_body(body: BodyProgram, values: Sequence[Any]) -> evaluate.Environment:
    """The values of one step of a body in float, of those of its arguments."""
    graph = body.model.graph
    table = evaluate.float_table(graph.equations, fast_convolutions(graph))
    return evaluate.evaluate(graph, *body.model.root.split(values), table)


def led(
    eqn: ir.Equation, lowering: evaluate.Lowering[evaluate.State], reference: evaluate.Environment
) -> evaluate.Lowering[evaluate.State]:
    """The lowering of an equation of a body in the other form, its integers the float form's."""
    graph = reference.graph
    whole = [var for var in eqn.outputs if jnp.issubdtype(graph.dtype(var), jnp.integer)]
    if not whole:
        return lowering
    return lambda state: {**lowering(state), **{var: reference.wide(var) for var in whole}}


def _operands(body: BodyProgram, env: evaluate.Environment) -> _Operands:
    region = body.model.root
    found = _Operands({}, {}, {})
    for place, atom in enumerate(region.operands):
        # An operand that no int8 site reads is not computed in the int8 form.
        is_there = isinstance(atom, ir.Literal) or (atom is not None and atom in env)
        value = env.read(atom) if atom is not None and is_there else None
        if place in region.scanned:
            found.sliced[place] = value
        elif place in region.carries:
            found.start[place] = value
        else:
            found.fixed[place] = value
    return found


def _unseen(form: Form[Seen], given: _Operands, every: Mapping[str, Any]) -> Seen:
    """What is seen of a body's sites in no step."""
    graph, arguments = form.body.model.graph, form.body.model.root.arguments
    values = [jax.ShapeDtypeStruct(graph.shape(var), graph.dtype(var)) for var in arguments]
    there = {**given.fixed, **given.start, **given.sliced}
    own = [None if there[place] is None else value for place, value in enumerate(values)]
    return jax.eval_shape(lambda a, b: form.step(a, b, every).seen, values, own).nothing()
