"""The graphs of an int8 model: its own, and those of loops and choices in each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan import layout
from jaxquant.plan.binding import Binding
from jaxquant.run.loops import arrays_of
from jaxquant.run.program import Program
from jaxquant.weights.fold import leaves_of_layers

Layer: TypeAlias = tuple[int, ...]  # of the scans over stacked weights around it, outermost first


class GraphLayer(NamedTuple):
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

    def walk(self) -> Iterator[GraphLayer]:
        """Itself and the layers of the bodies inside."""
        yield self
        for index in self.program.bodies:
            for layer in self.inside(index):
                yield from layer.walk()

    def inside(self, index: int) -> Iterator[GraphLayer]:
        """The layers of the bodies that one of its equations holds, ascending."""
        bodies = zip(self.program.bodies[index], self.binding.bodies[index], strict=True)
        for body, bound in bodies:
            # What layers share is read once, and joined to what each has of its own.
            every, stacked = arrays_of(body, self.qparams)
            leaves = leaves_of_layers(body.model, self.program.graph, self.params)
            for number, (layer, values) in enumerate(zip(bound.layers, leaves, strict=True)):
                own = jax.tree.map(lambda x, n=number: x[n, ...], stacked)  # views, of NumPy
                yield GraphLayer(body, layer, layout.joined(every, own), values)
