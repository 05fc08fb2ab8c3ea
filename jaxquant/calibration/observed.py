"""What calibration observes of a model: tensors of its own graph, and of its loops and choices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model


@dataclasses.dataclass(frozen=True)
class Observed:
    """The tensors that are observed.

    Attributes:
      model: that they are of.
      tensors: name -> tensor, of its own graph.
      bodies: likewise of the bodies of its loops and choices, by the index of their equation.
    """

    model: Model
    tensors: Mapping[str, ir.Var]
    bodies: Mapping[int, tuple[Observed, ...]]

    def walk(self) -> Iterator[Observed]:
        """What is observed of its own graph, and of each body inside."""
        yield self
        for body in (body for bodies in self.bodies.values() for body in bodies):
            yield from body.walk()

    @property
    def any_tensor(self) -> Any:
        """Shape and dtype of one of the tensors."""
        for var in self.tensors.values():
            return self.model.graph.avals[var]
        inside = (body for bodies in self.bodies.values() for body in bodies if body.names)
        return next(inside).any_tensor

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the statistics: those of the own tensors, then those of the bodies.

        A tensor in a scan over stacked weights has one for each layer, "NAME[3]".  All tensors of a
        layer come before those of the next one.
        """
        return tuple(f"{name}{layer_suffix(layer)}" for name, layer in self._numbered())

    def _numbered(self) -> list[tuple[str, tuple[int, ...]]]:
        """The names, and the layers of the scans around, outermost first."""
        found: list[tuple[str, tuple[int, ...]]] = [(name, ()) for name in self.tensors]
        for body in (body for bodies in self.bodies.values() for body in bodies):
            layers, inner = body.model.layers, body._numbered()
            heads = [()] if layers is None else [(number,) for number in range(layers)]
            found += [(name, (*head, *layer)) for head in heads for name, layer in inner]
        return found
