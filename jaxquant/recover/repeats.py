"""What runs how often: the graphs of a model, their layers, the steps of its loops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from jaxquant.graph.model import Model
from jaxquant.run.layers import Layer
from jaxquant.run.program import Program

Item = TypeVar("Item")


def is_repeated(model: Model) -> bool:
    """True where a graph runs any number of times for one layer: in a loop or a choice."""
    if model.body is None or model.holder is None:
        return False
    # A layer of a scan runs once, unless what holds the scan is repeated.
    return model.layers is None or is_repeated(model.holder)


def most_steps(model: Model) -> int | None:
    """How often a graph runs for one layer at the most; None where a `while` tells."""
    if model.body is None or model.holder is None or model.body.equation is None:
        return 1
    eqn, around = model.body.equation, most_steps(model.holder)
    if around is None or eqn.name == "while":
        return None
    # A scan over layers runs once for each; another one so often as it is long.
    return around * (eqn.params["length"] if eqn.name == "scan" and model.layers is None else 1)


def programs_of(program: Program) -> Iterator[Program]:
    """A program and those of the bodies of its loops and choices."""
    yield program
    for body in (body for bodies in program.bodies.values() for body in bodies):
        yield from programs_of(body)


def unrolled(
    model: Model, items: Mapping[Model, Sequence[tuple[int, Item]]], layer: Layer = ()
) -> Iterator[tuple[Item, Layer]]:
    """What there is in each layer, in the order that it has where the scans are Python loops.

    Args:
      model: a whole model, or a body.
      items: of each graph, each with the index of its equation.
      layer: of the body.
    """
    own = list(items.get(model, ()))
    for index, bodies in sorted(model.bodies.items()):
        # What stands before a loop comes before its layers.
        while own and own[0][0] < index:
            yield own.pop(0)[1], layer
        for body in bodies:
            layers = [layer] if body.layers is None else [(*layer, n) for n in range(body.layers)]
            # Layers come in the order in which they run.
            if body.layers is not None and model.graph.equations[index].params["reverse"]:
                layers.reverse()
            for each in layers:
                yield from unrolled(body, items, each)
    for _, item in own:
        yield item, layer
