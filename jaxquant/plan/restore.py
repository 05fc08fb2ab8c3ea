"""Weights that are stored as integers and read in float too: they are stored once.

StyleGAN2's demodulation, an embedding that is tied to the output layer, a penalty on the weights
that is an output: next to the int8 site something reads the weight, or what it is made of, in
float.  There the integers times their scales are read, so that no float array is kept beside them.
Where what is read does not follow from what is stored (a parameter of which the weight is a
normalized form), the parameter stays in float as well.

A site in a loop may store what is read in float outside: an embedding whose matrix is the output
layer of a loop that generates, stacked weights that a scan reads layer by layer.  So what a loop
reads follows from what is stored for the sites inside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxquant.graph import ir, primitives
from jaxquant.graph.expressions import find_expressions
from jaxquant.graph.sites import Site
from jaxquant.plan.layout import weight_view


@dataclasses.dataclass(frozen=True)
class Restored:
    """How a static tensor follows from what is stored for a site.

    Attributes:
      site: the site.
      graph: that the tensor is in.
      undone: the equations that led from the tensor to what is stored, or to what a loop or choice
        reads, the last one first.
      inside: where the site is in the body of a loop or choice, how what its steps read follows.
      slices: how many slices a scan with the site takes of what it reads; None where it takes none.
    """

    site: Site
    graph: ir.Graph
    undone: tuple[ir.Equation, ...]
    inside: Restored | None = None
    slices: int | None = None

    @property
    def stacked(self) -> tuple[int, ...]:
        """The sizes of the leading axes of what is stored, which are none of the site's weight."""
        # From the outermost scan inwards.
        own = () if self.slices is None else (self.slices,)
        return own if self.inside is None else (*own, *self.inside.stacked)

    @property
    def stored_in(self) -> ir.Graph:
        """The graph that the site is in."""
        return self.graph if self.inside is None else self.inside.stored_in

    def apply(self, value: jax.Array) -> jax.Array:
        """The tensor, from the dequantized value of what is stored."""
        if self.inside is not None:
            each = self.inside.apply
            # Each slice by itself: what is undone inside knows no stacks.
            value = each(value) if self.slices is None else jax.vmap(each)(value)
        graph = self.graph
        # Each step is taken back in turn: its inverse, then the shape that it had before.
        for eqn in self.undone:
            source = next(x for x in eqn.inputs if isinstance(x, int))
            if eqn.name == "transpose":
                value = value.transpose(np.argsort(eqn.params["permutation"]))
            elif eqn.name in ("mul", "div"):
                factor = next(x.value for x in eqn.inputs if isinstance(x, ir.Literal))
                value = value / factor if eqn.name == "mul" else value * factor
            value = value.reshape(graph.shape(source)).astype(graph.dtype(source))
        return value


def restorable(
    graph: ir.Graph, sites: Sequence[Site], integer: bool, inside: Mapping[ir.Var, Restored]
) -> dict[ir.Var, Restored]:
    """Static tensor -> how it follows from a stored weight.

    Args:
      graph: of a model or a body.
      sites: the quantized ones in it.
      integer: whether their operations take integers; see `jaxquant.plan.layout.weight_view`.
      inside: how operands of loops and choices follow from the weights of sites in these.
    """
    found: dict[ir.Var, Restored] = {}
    for site in sites:
        if site.stored_weight is None:
            continue
        view = weight_view(graph, site, integer)

        # Copies are left out of what is stored, and cannot be told from it.
        if view.shape == graph.shape(view.var):  # else it is stored without its copies
            _add_undone(graph, view.var, Restored(site, graph, ()), found)
    for var, restored in inside.items():
        _add_undone(graph, var, restored, found)
    # A static tensor that is computed twice (a transpose in two layers) is the same one.
    expressions = find_expressions(graph)
    by_expression = {expressions[var]: restored for var, restored in found.items()}
    twins = {
        var: by_expression[expressions[var]]
        for eqn in graph.equations
        for var in eqn.outputs
        if graph.static[var] and expressions[var] in by_expression
    }
    # An own way goes before that of a twin.
    return twins | found


def _add_undone(
    graph: ir.Graph, var: ir.Var, restored: Restored, found: dict[ir.Var, Restored]
) -> None:
    """Add a tensor and what it was made of by equations that can be undone."""
    while True:
        found.setdefault(var, restored)
        eqn = graph.producer.get(var)
        # Up to the parameter, or to what loses values on the way.
        if eqn is None or not _can_be_undone(graph, eqn):
            break
        restored = dataclasses.replace(restored, undone=(*restored.undone, eqn))
        var = eqn.input_vars[0]


def _can_be_undone(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for a rearrangement, a cast between floats, and a number that weights are scaled by."""
    if eqn.name in ("mul", "div") and len(eqn.input_vars) == 1:
        factors = [x.value for x in eqn.inputs if isinstance(x, ir.Literal)]
        # x * c and x / c can be undone; c / x cannot by a factor.
        by_factor = eqn.name == "mul" or isinstance(eqn.inputs[1], ir.Literal)
        return by_factor and all(np.isfinite(f) and f != 0 for f in factors)
    if eqn.name == "convert_element_type":
        return graph.dtype(eqn.inputs[0]) != eqn.params["new_dtype"] and all(
            jax.numpy.issubdtype(graph.dtype(x), jax.numpy.floating)
            for x in (*eqn.inputs, *eqn.outputs)
        )
    return eqn.name != "rev" and primitives.is_movement(graph, eqn)
