"""Random masks that are the same in every call: dropout that is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_of
from jaxquant.graph.model import Model
from jaxquant.graph.regions import Region

# The primitives that draw random numbers from a key.
DRAWS = frozenset({"random_bits", "random_gamma", "threefry2x32"})


def find_mask(model: Model) -> tuple[str, str] | None:
    """A random mask that is the same in every call, as a fixed key makes it: active dropout.

    Random values that are compared, and whose outcome then chooses among or multiplies activations.
    Random features and noise are none.

    Returns:
      Its layer, and the parameter path of the key, "" where it is not among the parameters.
    """
    graph = model.graph
    # A key among the parameters is named in the message; another one is closed over.
    parameters = {graph.paths[var] for var in graph.leaves}
    for region in model.regions:
        here, fixed = region.graph, _given_fixed(region)
        drawn: dict[ir.Var, ir.Equation] = {}
        # Fixed: follows from parameters and constants alone, so is the same mask in every call.
        for eqn in here.equations:
            origins = [drawn[v] for v in eqn.input_vars if v in drawn]
            is_fixed = all(here.is_static(x) or x in fixed for x in eqn.inputs)
            if is_fixed:
                fixed.update(eqn.outputs)
            # Random and fixed is a mask only where it is multiplied with, or chooses between,
            # activations.
            if is_fixed and eqn.name in DRAWS:
                drawn[eqn.outputs[0]] = eqn
            elif is_fixed and origins:
                drawn.update((var, origins[0]) for var in eqn.outputs)
            elif origins and eqn.name in _APPLIES and _chooses(here, eqn, drawn):
                sources = [here.paths[v] for v in here.sources(origins[0].outputs[0])]
                key = next((path for path in sources if path in parameters), "")
                return layer_of(here, eqn, graph.classes), key
    return None


def _given_fixed(region: Region) -> set[ir.Var]:
    """What a body is given that hangs on no input of the model: keys that a scan goes over."""
    if region.holder is None:
        return set()
    outer = region.holder.graph
    return {
        var
        for k, (var, operand) in enumerate(zip(region.arguments, region.operands, strict=True))
        # A carry changes from step to step, even one that began fixed.
        if k not in region.carries and operand is not None and outer.is_static(operand)
    }


_APPLIES = frozenset({"select_n", "mul", "and"})


def _chooses(graph: ir.Graph, eqn: ir.Equation, drawn: Mapping[ir.Var, Any]) -> bool:
    """Whether an equation that also reads an activation applies drawn truth values to it."""
    # The condition of a choice is its first operand.
    applied = eqn.inputs[:1] if eqn.name == "select_n" else eqn.inputs
    truths = [
        x for x in applied if isinstance(x, int) and x in drawn and _is_truth(graph, x, drawn)
    ]
    return bool(truths)


def _is_truth(graph: ir.Graph, var: ir.Var, drawn: Mapping[ir.Var, Any]) -> bool:
    """True for truth values, also as floats and divided by the share that is kept."""
    # Back through what makes floats of truth values.
    while graph.dtype(var) != jnp.bool_:
        eqn = graph.producer[var]
        if eqn.name not in _SCALES:
            return False
        var = next(v for v in eqn.input_vars if v in drawn)
    return True


_SCALES = frozenset({"convert_element_type", "broadcast_in_dim", "div", "mul"})
