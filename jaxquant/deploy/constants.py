"""The tensors of a graph that depend on nothing, as arrays of an exported network."""

from __future__ import annotations

import math

import jax
import numpy as np

from jaxquant.graph import evaluate, ir

MAX_CONSTANT = 2**20  # elements of a folded tensor; a larger one is computed in the network


def is_foldable(graph: ir.Graph, var: ir.Var) -> bool:
    """True for a static tensor of known size that no parameter is in."""
    if var in graph.constants:
        return True
    if var in graph.leaves or set(graph.sources(var)) & set(graph.leaves):
        return False
    behind = list(ir.upstream(graph, [var]))
    if any(eqn.name == "dim_as_value" for eqn in behind):  # a size that varies
        return False
    shapes = [graph.shape(v) for eqn in behind for v in (*eqn.input_vars, *eqn.outputs)]
    known = all(isinstance(size, int) for shape in shapes for size in shape)
    return known and math.prod(graph.shape(var)) <= MAX_CONSTANT


def fold(graph: ir.Graph, var: ir.Var) -> np.ndarray:
    """The value of such a tensor."""

    # By the library's own evaluation, so that the file holds what the model computes with.
    table = evaluate.float_table(ir.upstream(graph, [var]))
    env = evaluate.evaluate(graph, {}, [None] * len(graph.inputs), table)
    return np.asarray(jax.device_get(env.read(var)))
