"""The float model with looks at some of its tensors, inside loops and choices too.

Each look keeps a state, which one evaluation of its graph changes.  Inside a scan over stacked
weights each layer has a state of its own, along a leading axis; in another loop, and in a choice,
one state goes through the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, loops
from jaxquant.graph.model import Model
from jaxquant.graph.positions import RealIn, all_entries
from jaxquant.run.float_forms import fast_convolutions

States: TypeAlias = dict[str, Any]
# Gives which entries of a tensor of a graph belong to no padding, bool of a shape that is broadcast
# to the tensor's; None where all of them count.
Real: TypeAlias = Callable[[ir.Var], jax.Array | None]


class Look(NamedTuple):
    """What is done with tensors of a graph.

    Attributes:
      reads: the tensors.
      update: gives the state behind an evaluation of the graph; all its arrays keep their shapes
        and dtypes.  Its last argument gives which entries of a tensor belong to no padding.
    """

    reads: tuple[ir.Var, ...]
    update: Callable[[Any, evaluate.Environment, Real], Any]


Looks: TypeAlias = Mapping[Model, Mapping[str, Look]]


def look_at(
    looks: Looks,
    model: Model,
    params: Sequence[Any],
    flat: Any,
    states: States,
    real: RealIn = all_entries,
) -> States:
    """Evaluate a model for what is looked at.

    Args:
      looks: of each graph, by names that are unique in the whole model.
      model: the whole model.
      params: the values of its leaves, in their order.
      flat: its flattened inputs.
      states: of all looks.
      real: gives which entries of a tensor belong to no padding.

    Returns:
      The states behind it.
    """
    leaves = dict(zip(model.graph.leaves, params, strict=True))
    return _evaluated(looks, model, leaves, flat, states, real)[1]


def _evaluated(
    looks: Looks,
    model: Model,
    leaves: Mapping[ir.Var, Any],
    inputs: Any,
    states: States,
    real: RealIn,
) -> tuple[evaluate.Environment, States]:
    graph, own = model.graph, looks.get(model, {})
    # Only what a look reads is evaluated: the head of a network often is not.
    roots = [var for look in own.values() for var in look.reads]
    if model.body is not None:
        # A body has to give its results to the loop in any case.
        roots += graph.output_vars
    seen: States = {}
    forms = dict(fast_convolutions(graph))
    for index, bodies in model.bodies.items():
        # A loop is run for its looks even where nothing reads its results.
        if names := [name for body in bodies for name in _names(looks, body)]:
            eqn = graph.equations[index]
            some = {name: states[name] for name in names}
            forms[index] = _looping(looks, eqn, bodies, some, seen, real)
            roots += eqn.outputs
    # Upstream of what is read, with loops in the forms that look inside.
    table = evaluate.float_table(ir.upstream(graph, roots), forms)
    env = evaluate.evaluate(graph, leaves, inputs, table)
    here = functools.partial(real, model)
    after = {name: look.update(states[name], env, here) for name, look in own.items()}
    return env, {**seen, **after}


def _looping(
    looks: Looks,
    eqn: ir.Equation,
    bodies: Sequence[Model],
    states: States,
    seen: States,
    real: RealIn,
) -> evaluate.Lowering[evaluate.Environment]:
    """The lowering of a loop or choice, which puts the states behind it into `seen`."""
    is_layered = bodies[0].layers is not None

    def step_of(body: Model) -> loops.Step:
        def step(given: loops.Given) -> loops.Gives:
            before = given.sliced if is_layered else given.kept
            leaves, inputs = body.root.split(given.values)
            env, after = _evaluated(looks, body, leaves, inputs, before, real)
            results = [env.read(x) for x in body.graph.outputs]
            # A layer has a state of its own, which the scan stacks.
            if is_layered:
                return loops.Gives(results, after)
            return loops.Gives(results, None, {**before, **after})

        return step

    # Layers hand nothing on: each sees its own state, cut from the stack as its weights are.
    def lowering(env: evaluate.Environment) -> evaluate.Values:
        operands = [env.read(x) for x in eqn.inputs]
        steps = [step_of(body) for body in bodies]
        if is_layered:
            found = loops.run(eqn, operands, steps, sliced=states)
            seen.update(found.stacked)
        else:
            found = loops.run(eqn, operands, steps, kept=states)
            seen.update(found.kept)
        return dict(zip(eqn.outputs, found.results, strict=True))

    return lowering


def _names(looks: Looks, model: Model) -> list[str]:
    """The names of the looks of a graph and of its bodies."""
    inside = (body for bodies in model.bodies.values() for body in bodies)
    return [*looks.get(model, {}), *(name for body in inside for name in _names(looks, body))]


def is_replaced(steps: jax.Array, rows: int, number: int = 0) -> jax.Array:
    """Which of the rows so far a step replaces by its own, bool [R].

    So that after n steps each row is from any of them with the same probability, 1 / n: a
    reservoir.

    Args:
      steps: how many there were before, int32 [].
      rows: R.
      number: one of several draws of a step.
    """
    # By the number of the step: the same rows in each run.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), steps), number)
    part = 1 / (steps + 1).astype(jnp.float32)
    return jax.random.uniform(key, (rows,), jnp.float32) < part
