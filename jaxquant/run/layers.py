"""The graphs of an int8 model one by one: its own, and those in it in each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxquant.plan import layout
from jaxquant.plan.bind import Binding
from jaxquant.run.loops import arrays_of
from jaxquant.run.program import Program
from jaxquant.weights.fold import leaves_of_layers


class Layer(NamedTuple):
    """A graph of a model, or of a body in one layer of the scans around it.

    Attributes:
      program: the int8 program of the graph, which all layers share.
      binding: the plan in it, with the grids of this layer.
      params: the values of its leaves, as a pytree.
      qparams: the arrays of its sites in this layer.
    """

    program: Program
    binding: Binding
    params: Any
    qparams: Mapping[str, Any]


def walk(program: Program, params: Any, qparams: Mapping[str, Any]) -> Iterator[Layer]:
    """The graph of a model, and those of all bodies with int8 sites, each in all its layers.

    Args:
      program: of a whole model.
      params, qparams: its arrays.
    """
    return _walk(Layer(program, program.binding, params, qparams))


def _walk(outer: Layer) -> Iterator[Layer]:
    yield outer
    for index, programs in outer.program.bodies.items():
        for program, body in zip(programs, outer.binding.bodies[index], strict=True):
            every, stacked = arrays_of(program, outer.qparams)
            leaves = leaves_of_layers(body.model, outer.binding.graph, outer.params)
            for number, (binding, values) in enumerate(zip(body.layers, leaves, strict=True)):
                own: Mapping[str, Any] = every
                if body.model.layers is not None:
                    slices = jax.tree.map(lambda x, number=number: x[number], stacked)
                    own = layout.joined(every, slices)
                yield from _walk(Layer(program, binding, values, own))
