"""Observe the tensors of a model, those inside its loops and choices too, in one evaluation.

Inside a scan over stacked weights the statistics of each layer stay apart; those of another loop
are of all its steps together, and those of a branch of the steps that choose it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.calibration import counting, histogram
from jaxquant.calibration.observed import Observed
from jaxquant.calibration.observers import Observer
from jaxquant.graph import evaluate, ir, loops
from jaxquant.graph.positions import RealIn, all_entries


class Seen(NamedTuple):
    """What one evaluation shows of T tensors, in the order of `Observed.names`.

    Attributes:
      counts: of their histograms.
      own: the observer's state of each, () without an observer.
    """

    counts: counting.Counts
    own: tuple[Any, ...]


class Watch(NamedTuple):
    """How tensors are observed.

    Attributes:
      counter: counts a tensor.
      observer: keeps statistics of its own; None for none.
      forms: those of the float model's equations that run faster here.
      real: gives which entries of a tensor belong to no padding.
    """

    counter: counting.Counter
    observer: Observer | None
    forms: evaluate.Forms
    real: RealIn = all_entries


def observe(
    observed: Observed,
    params: Any,
    inputs: Sequence[Any],
    own: Sequence[Any],
    watch: Watch,
    known: Mapping[ir.Var, Any],
) -> Seen:
    """Evaluate a float model and observe it.

    Args:
      observed: its tensors.
      params: its parameters.
      inputs: the flattened inputs.
      own: the observer's states so far.
      watch: how.
      known: see `jaxquant.graph.evaluate.evaluate_model`.
    """
    graph = observed.model.graph
    inside = _Inside(observed, own, watch)
    env = evaluate.evaluate_model(
        graph,
        params,
        inputs,
        # Upstream of what is observed alone: a head that is left in float need not run.
        equations=_needed(observed),
        known=known,
        forms={**watch.forms(graph), **inside.lowerings()},
    )
    return inside.seen(env)


def _needed(observed: Observed) -> list[ir.Equation]:
    """The equations that the observed tensors depend on, and the loops with such inside."""
    graph, roots = observed.model.graph, list(observed.tensors.values())
    for index, bodies in observed.bodies.items():
        if any(body.names for body in bodies):
            roots += graph.equations[index].outputs
    return list(ir.upstream(graph, roots))


class _Inside:
    """One evaluation of a graph: what is seen of its tensors and of its bodies."""

    def __init__(self, observed: Observed, own: Sequence[Any], watch: Watch) -> None:
        self._observed = observed
        self._watch = watch
        self._own = own
        self._seen: dict[int, Seen] = {}
        # A loop without observed tensors runs as it is.
        self._bodies = {
            index: bodies
            for index, bodies in observed.bodies.items()
            if any(body.names for body in bodies)
        }

    def lowerings(self) -> dict[int, evaluate.Lowering[evaluate.Environment]]:
        """The lowerings of the loops and choices, which note what is seen inside."""
        # States come in the order of names: the graph's own, then those of its bodies.
        found, place = {}, len(self._observed.tensors)
        for index, bodies in self._bodies.items():
            size = sum(_size(body) for body in bodies)
            eqn = self._observed.model.graph.equations[index]
            found[index] = self._lowering(eqn, bodies, self._own[place : place + size])
            place += size
        return found

    def seen(self, env: evaluate.Environment) -> Seen:
        """What was seen, once the graph is evaluated."""
        # Read in the model's dtype, as the model's own readers have it.
        watch, tensors = self._watch, self._observed.tensors.values()
        values = [env.read(var) for var in tensors]
        real = [watch.real(self._observed.model, var) for var in tensors]
        own: tuple[Any, ...] = ()
        if watch.observer is not None:
            # A user's observer knows no mask: it sees zeros where padding is.
            shown = [x if r is None else jnp.where(r, x, 0) for x, r in zip(values, real)]
            own = tuple(map(watch.observer.update, self._own[: len(values)], shown))
        parts = [counting.count_all(values, watch.counter, real)] if values else []
        for index in self._bodies:
            parts.append(self._seen[index].counts)
            own += self._seen[index].own
        return Seen(_concatenated(parts), own)

    def _lowering(
        self, eqn: ir.Equation, bodies: Sequence[Observed], own: Sequence[Any]
    ) -> evaluate.Lowering[evaluate.Environment]:
        run = _layer_by_layer if bodies[0].model.layers is not None else _all_steps

        def lowering(env: evaluate.Environment) -> evaluate.Values:
            operands = [env.read(x) for x in eqn.inputs]
            results, self._seen[eqn.index] = run(eqn, operands, bodies, own, self._watch)
            return dict(zip(eqn.outputs, results, strict=True))

        return lowering


def _layer_by_layer(
    eqn: ir.Equation,
    operands: Sequence[Any],
    bodies: Sequence[Observed],
    own: Sequence[Any],
    watch: Watch,
) -> tuple[Sequence[Any], Seen]:
    """Run a scan over stacked weights; the states of its tensors go through it with them."""
    (body,) = bodies
    width = len(body.names)
    # States of one tensor in all layers lie one body's width apart.
    stacked = tuple(_stack(own[place::width]) for place in range(width)) if own else ()

    def step(given: loops.Given) -> loops.Gives:
        results, seen = _step(body, given.values, given.sliced, watch)
        return loops.Gives(results, seen)

    found = loops.run(eqn, operands, [step], sliced=stacked)
    # [layers, tensors, ...] as [layers * tensors, ...], in the order of the names.
    counts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found.stacked.counts)
    layers = range(eqn.params["length"])
    states = [jax.tree.map(lambda x, n=n: x[n], found.stacked.own) for n in layers]
    return found.results, Seen(counts, tuple(state for each in states for state in each))


def _all_steps(
    eqn: ir.Equation,
    operands: Sequence[Any],
    bodies: Sequence[Observed],
    own: Sequence[Any],
    watch: Watch,
) -> tuple[Sequence[Any], Seen]:
    """Run another loop, or a choice; what is seen in its steps is joined on the way."""
    sizes = [len(body.names) for body in bodies]
    # Shapes have to be known before the first step: zeros for each tensor.
    empty = jax.tree.map(lambda x: jnp.stack([x] * sum(sizes)), histogram.init())

    def step_of(number: int) -> loops.Step:
        place = slice(sum(sizes[:number]), sum(sizes[: number + 1]))

        def step(given: loops.Given) -> loops.Gives:
            states, kept = given.kept
            # A branch has the statistics of its own tensors, at its own place.
            results, seen = _step(bodies[number], given.values, kept[place], watch)
            if sizes[number]:
                some = jax.tree.map(lambda x: x[place], states)
                some = counting.joined(some, seen.counts)
                # Only the part of the body that ran: a choice leaves the statistics of others
                # alone.
                states = jax.tree.map(lambda x, y: x.at[place].set(y), states, some)
            if kept:
                kept = (*kept[: place.start], *seen.own, *kept[place.stop :])
            return loops.Gives(results, None, (states, kept))

        return step

    steps = [step_of(number) for number in range(len(bodies))]
    found = loops.run(eqn, operands, steps, kept=(empty, tuple(own)))
    states, kept = found.kept
    return found.results, Seen(counting.as_counts(states), kept)


def _step(
    body: Observed, values: Sequence[Any], own: Sequence[Any], watch: Watch
) -> tuple[list[Any], Seen]:
    """One step of a body: what it gives, and what is seen in it."""
    graph, inside = body.model.graph, _Inside(body, own, watch)
    leaves, inputs = body.model.root.split(values)
    table = evaluate.float_table(graph.equations, {**watch.forms(graph), **inside.lowerings()})
    env = evaluate.evaluate(graph, leaves, inputs, table)
    return [env.read(x) for x in graph.outputs], inside.seen(env)


def _size(body: Observed) -> int:
    """How many statistics there are of a body, in all its layers."""
    return len(body.names) * (body.model.layers or 1)


def _stack(states: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *states)


def _concatenated(parts: Sequence[counting.Counts]) -> counting.Counts:
    # A body may hold nothing that is observed but what is in loops inside.
    if not parts:
        counted, extremes = ((0, 2, histogram.BINS), jnp.uint32), ((0, 2), jnp.float32)
        shapes = counted, extremes, ((0, 2), jnp.uint32)
        return counting.Counts(*(jnp.zeros(*each) for each in shapes))
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
