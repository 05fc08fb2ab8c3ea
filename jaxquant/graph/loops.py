"""Run loops and choices with bodies of our own: what a step computes is a function, not a jaxpr."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.jax_shim import jaxprs


class Given(NamedTuple):
    """What a step is given.

    Attributes:
      values: of the arguments of the body; None for those that no step reads.
      sliced: its entry of the arrays that go through a scan beside the model's own.
      kept: what the step before it kept, or what was given at the start.
    """

    values: Sequence[Any]
    sliced: Any
    kept: Any


class Gives(NamedTuple):
    """What a step gives: the body's results; what is stacked by a scan; what the next step gets."""

    results: Sequence[Any]
    stacked: Any = None
    kept: Any = None


Step: TypeAlias = Callable[[Given], Gives]


def run(
    eqn: ir.Equation,
    operands: Sequence[Any],
    steps: Sequence[Step],
    sliced: Any = None,
    kept: Any = None,
) -> Gives:
    """Run a `scan`, `while` or `cond`.

    Args:
      eqn: its equation.
      operands: what it reads; None for what no step reads.
      steps: what each body computes, without the test of a `while`.
      sliced: of a scan, arrays with a leading axis of which each step gets one entry.
      kept: what the first step gets; a choice gives it to the branch that is chosen.
    """
    if eqn.name == "scan":
        return _scan(eqn, operands, steps[0], sliced, kept)
    if eqn.name == "while":
        return _while(eqn, operands, steps[0], kept)
    # Branches have no steps: what is kept goes through whichever is chosen.
    index, *values = operands
    branches = [_branch(step) for step in steps]
    results, kept = jax.lax.switch(index, branches, values, kept)
    return Gives(results, None, kept)


def run_in_turn(
    eqn: ir.Equation,
    operands: Sequence[Any],
    step: Callable[[int, Sequence[Any]], Sequence[Any]],
) -> list[Any]:
    """Run a `scan` in Python, one step after the other, so that each may be something else.

    Args:
      eqn: its equation, of one step at least.
      operands: what it reads; None for what no step reads.
      step: (its number, the values of the body's arguments) -> the body's results.
    """
    constants, carried = jaxprs.scan_counts(eqn.params)
    fixed, carry = operands[:constants], operands[constants : constants + carried]
    sliced = operands[constants + carried :]
    numbers = range(eqn.params["length"])
    stacked: dict[int, Sequence[Any]] = {}
    for number in reversed(numbers) if eqn.params["reverse"] else numbers:
        # What is not read (None) has no slices either.
        slices = [None if x is None else jnp.asarray(x)[number] for x in sliced]
        results = _arrays(step(number, [*fixed, *carry, *slices]))
        # A step's results are its carry first, as of JAX's own scans.
        carry, stacked[number] = results[:carried], results[carried:]
    # In the order of the steps, whichever way they went.
    columns = zip(*(stacked[number] for number in numbers), strict=True)
    return [*carry, *map(jnp.stack, columns)]


def _branch(step: Step) -> Callable[[list[Any], Any], tuple[list[Any], Any]]:
    def branch(values: list[Any], kept: Any) -> tuple[list[Any], Any]:
        found = step(Given(values, None, kept))
        return _arrays(found.results), found.kept

    return branch


def _scan(eqn: ir.Equation, operands: Sequence[Any], step: Step, sliced: Any, kept: Any) -> Gives:
    constants, carried = jaxprs.scan_counts(eqn.params)
    fixed, start = operands[:constants], list(operands[constants : constants + carried])

    def body(carry: Any, slices: tuple[list[Any], Any]) -> tuple[Any, Any]:
        found = step(Given([*fixed, *carry[0], *slices[0]], slices[1], carry[1]))
        results = _arrays(found.results)
        return (results[:carried], found.kept), (results[carried:], found.stacked)

    # A length that varies, of an exported program, is taken from what the scan goes through alone.
    steps = list(operands[constants + carried :]), sliced
    (carry, kept), (results, stacked) = jax.lax.scan(
        body,
        (start, kept),
        steps,
        length=None if jax.tree.leaves(steps) else eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return Gives([*carry, *results], stacked, kept)


def _while(eqn: ir.Equation, operands: Sequence[Any], step: Step, kept: Any) -> Gives:
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    read_by_test, fixed = operands[:of_test], operands[of_test : of_test + of_body]
    test = jaxprs.jaxpr_as_fun(eqn.params["cond_jaxpr"])

    # What is kept beside the carry is not the test's.
    def goes_on(carry: tuple[list[Any], Any]) -> Any:
        return test(*read_by_test, *carry[0])[0]

    def body(carry: tuple[list[Any], Any]) -> tuple[list[Any], Any]:
        found = step(Given([*fixed, *carry[0]], None, carry[1]))
        return _arrays(found.results), found.kept

    start = list(operands[of_test + of_body :]), kept
    results, kept = jax.lax.while_loop(goes_on, body, start)
    return Gives(results, None, kept)


def _arrays(results: Sequence[Any]) -> list[Any]:
    """The results of a step as arrays: some are numbers that are written into the program."""
    return [jnp.asarray(x) for x in results]
