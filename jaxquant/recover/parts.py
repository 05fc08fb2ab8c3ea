"""The parts of a model: its own graph, and each layer of the bodies of its loops and choices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax

from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model
from jaxquant.plan import layout
from jaxquant.plan.bind import Binding
from jaxquant.run.loops import arrays_of
from jaxquant.run.program import Program
from jaxquant.weights.fold import leaves_of_layers

Layer: TypeAlias = tuple[int, ...]  # of the scans over stacked weights around it, outermost first
Item = TypeVar("Item")


class Part(NamedTuple):
    """A graph of a model in one layer of the scans over stacked weights around it.

    Attributes:
      program: of the graph; all layers of a body have one.
      binding: of the layer, with its grids.
      qparams: the arrays of its sites and of those in its bodies.
      params: the values of its leaves, as a pytree.
    """

    program: Program
    binding: Binding
    qparams: Mapping[str, Any]
    params: Any

    @property
    def layer(self) -> Layer:
        """The numbers of its layer."""
        return self.binding.layer

    def named(self, name: str) -> str:
        """The name of one of its sites or tensors among those of all layers: "mlp/input[3]"."""
        return name + layer_suffix(self.layer)

    def walk(self) -> Iterator[Part]:
        """Itself and the parts inside."""
        yield self
        for index in self.program.bodies:
            for part in self.inside(index):
                yield from part.walk()

    def inside(self, index: int) -> Iterator[Part]:
        """The layers of the bodies that one of its equations holds, ascending."""
        bodies = zip(self.program.bodies[index], self.binding.bodies[index], strict=True)
        for body, bound in bodies:
            every, stacked = arrays_of(body, self.qparams)
            leaves = leaves_of_layers(body.model, self.program.graph, self.params)
            for number, (layer, values) in enumerate(zip(bound.layers, leaves, strict=True)):
                own = jax.tree.map(lambda x, n=number: x[n, ...], stacked)  # views, of NumPy
                yield Part(body, layer, layout.joined(every, own), values)


def is_repeated(model: Model) -> bool:
    """True where a graph runs any number of times for one layer: in a loop or a choice."""
    if model.body is None or model.holder is None:
        return False
    return model.layers is None or is_repeated(model.holder)


def most_steps(model: Model) -> int | None:
    """How often a graph runs for one layer at the most; None where a `while` tells."""
    if model.body is None or model.holder is None or model.body.equation is None:
        return 1
    eqn, around = model.body.equation, most_steps(model.holder)
    if around is None or eqn.name == "while":
        return None
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
        while own and own[0][0] < index:
            yield own.pop(0)[1], layer
        for body in bodies:
            layers = [layer] if body.layers is None else [(*layer, n) for n in range(body.layers)]
            if body.layers is not None and model.graph.equations[index].params["reverse"]:
                layers.reverse()
            for each in layers:
                yield from unrolled(body, items, each)
    for _, item in own:
        yield item, layer
