"""Weights that are stored as integers and read in float too: they are stored once.

StyleGAN2's demodulation, an embedding that is tied to the output layer, a penalty on the weights
that is an output: next to the int8 site something reads the weight, or what it is made of, in
float.  There the integers times their scales are read, so that no float array is kept beside them.
Where what is read does not follow from what is stored (a parameter of which the weight is a
normalized form), the parameter stays in float as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jaxquant.graph import ir, primitives
from jaxquant.graph.sites import Site
from jaxquant.plan.layout import weight_view


@dataclasses.dataclass(frozen=True)
class Restored:
    """How a static tensor follows from what is stored for a site.

    Attributes:
      site: the site.
      undone: the equations that led from the tensor to what is stored, the last one first.
    """

    site: Site
    undone: tuple[ir.Equation, ...]

    def apply(self, graph: ir.Graph, value: jax.Array) -> jax.Array:
        """The tensor, from the dequantized value of what is stored."""
        for eqn in self.undone:
            source = next(x for x in eqn.inputs if isinstance(x, int))
            if eqn.name == "transpose":
                value = value.transpose(np.argsort(eqn.params["permutation"]))
            elif eqn.name in ("mul", "div"):
                factor = next(x.value for x in eqn.inputs if isinstance(x, ir.Literal))
                value = value / factor if eqn.name == "mul" else value * factor
            value = value.reshape(graph.shape(source)).astype(graph.dtype(source))
        return value


def restorable(graph: ir.Graph, sites: Sequence[Site], integer: bool) -> dict[ir.Var, Restored]:
    """Static tensor -> how it follows from a stored weight.

    Args:
      graph: the traced model.
      sites: the quantized ones.
      integer: whether their operations take integers; see `jaxquant.plan.layout.weight_view`.
    """
    found: dict[ir.Var, Restored] = {}
    for site in sites:
        if site.stored_weight is None:
            continue
        view = weight_view(graph, site, integer)
        if view.shape != graph.shape(view.var):
            continue  # it is stored without its copies
        var = view.var
        undone: tuple[ir.Equation, ...] = ()
        while True:
            found.setdefault(var, Restored(site, undone))
            eqn = graph.producer.get(var)
            if eqn is None or not _can_be_undone(graph, eqn):
                break
            undone = (*undone, eqn)
            var = eqn.input_vars[0]
    by_expression = {graph.expression(var): restored for var, restored in found.items()}
    twins = {
        var: by_expression[graph.expression(var)]
        for eqn in graph.equations
        for var in eqn.outputs
        if graph.static[var] and graph.expression(var) in by_expression
    }
    return twins | found


def _can_be_undone(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for a rearrangement, a cast between floats, and a number that weights are scaled by."""
    if eqn.name in ("mul", "div") and len(eqn.input_vars) == 1:
        factors = [x.value for x in eqn.inputs if isinstance(x, ir.Literal)]
        by_factor = eqn.name == "mul" or isinstance(eqn.inputs[1], ir.Literal)
        return by_factor and all(np.isfinite(f) and f != 0 for f in factors)
    if eqn.name == "convert_element_type":
        return graph.dtype(eqn.inputs[0]) != eqn.params["new_dtype"] and all(
            jax.numpy.issubdtype(graph.dtype(x), jax.numpy.floating)
            for x in (*eqn.inputs, *eqn.outputs)
        )
    return eqn.name != "rev" and primitives.is_movement(graph, eqn)
