"""What a model computes of its parameters alone, in NumPy: nothing to compile or to run again.

A normalization's 1 / sqrt(variance + epsilon) is such a value.  XLA would compile a small kernel
for each, in every program that holds the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir

_LARGEST = 1 << 20  # elements that are computed here

_ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "copy": np.positive,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "rsqrt": lambda x: np.divide(np.float32(1), np.sqrt(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}


def static_values(
    graph: ir.Graph, params: Any, equations: Iterable[ir.Equation] | None = None
) -> dict[ir.Var, np.ndarray]:
    """The outputs of equations that are simple functions of float32 parameters.

    Args:
      graph: the traced model.
      params: its parameters, in the pytree that it was traced with.
      equations: those to evaluate, in order; by default all.

    Returns:
      float32 values; of size 1 along an axis that a value was only spread over.  Others than
      elementwise functions and changes of shape are missing, and large ones.
    """
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    sources = {**graph.constants, **leaves}
    found: dict[ir.Var, np.ndarray] = {}
    for eqn in graph.equations if equations is None else equations:
        # Only what is static and gives one tensor.
        if not eqn.inputs or len(eqn.outputs) != 1 or not graph.static[eqn.outputs[0]]:
            continue
        # In NumPy, in float32 as XLA does it: small things that would cost a compilation each.
        if any(graph.dtype(atom) != np.float32 for atom in (*eqn.inputs, *eqn.outputs)):
            continue
        operands = [_operand(atom, found, sources) for atom in eqn.inputs]
        if not all(x is not None and x.size <= _LARGEST for x in operands):
            continue
        # Infinities and NaN come out as they do in XLA, which gives no warning.
        with np.errstate(all="ignore"):
            value = _apply(graph, eqn, operands)
        if value is not None:
            found[eqn.outputs[0]] = value
    return found


def _operand(
    atom: ir.Atom, found: Mapping[ir.Var, np.ndarray], sources: Mapping[ir.Var, Any]
) -> np.ndarray | None:
    if isinstance(atom, ir.Literal):
        return np.asarray(atom.value)
    if atom in found:
        return found[atom]
    source = sources.get(atom)
    # A parameter that is spread over processes is read nowhere here.
    if source is None or not getattr(source, "is_fully_addressable", True):
        return None
    return np.asarray(source, np.float32) if np.size(source) <= _LARGEST else None


def _apply(graph: ir.Graph, eqn: ir.Equation, operands: list[Any]) -> np.ndarray | None:
    if eqn.name in _ELEMENTWISE:
        return np.asarray(_ELEMENTWISE[eqn.name](*operands), np.float32)
    x, params = operands[0], eqn.params
    if eqn.name == "broadcast_in_dim":
        # Not spread: an axis of size 1 stands for all its copies.
        shape = np.ones(len(params["shape"]), int)
        shape[list(params["broadcast_dimensions"])] = x.shape
        return x.reshape(shape)
    # One entry that stands for copies lacks the shape that the equation changes.
    if x.shape != graph.shape(eqn.inputs[0]):
        return None
    if eqn.name == "reshape" and params["dimensions"] is None:
        return x.reshape(params["new_sizes"])
    if eqn.name == "squeeze":
        return x.squeeze(tuple(params["dimensions"]))
    if eqn.name == "convert_element_type":
        return x
    return None
