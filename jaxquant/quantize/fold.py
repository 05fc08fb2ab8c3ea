"""Evaluate what depends on parameters alone: weights on their way to a site, epilogue operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.graph.primitives import varying_axes
from jaxquant.plan.epilogue import AffineStep


def fold(
    graph: ir.Graph, params: Any, weights: Sequence[ir.Var], operands: Sequence[ir.Var]
) -> tuple[dict[ir.Var, np.ndarray], dict[ir.Var, np.ndarray]]:
    """The values of static tensors, in one compiled call: weights of sites, epilogue operands.

    A weight comes as the operation takes it.  An operand that was broadcast along an axis (a bias
    spread over the batch) has size 1 there, so that nothing of the size of an activation is made.
    """
    weights, operands = list(dict.fromkeys(weights)), list(dict.fromkeys(operands))
    needed = list(ir.walk_back(graph, [*weights, *operands]))

    def run(leaves: list[Any]) -> tuple[list[Any], list[Any]]:
        env = evaluate.evaluate(
            graph,
            dict(zip(graph.leaves, leaves, strict=True)),
            [None] * len(graph.inputs),
            equations=needed,
        )
        whole = [env.read(var) for var in weights]
        return whole, [_without_copies(graph, var, env.read(var)) for var in operands]

    values = jax.device_get(jax.jit(run)(jax.tree.leaves(params)))
    return dict(zip(weights, values[0], strict=True)), dict(zip(operands, values[1], strict=True))


def _without_copies(graph: ir.Graph, var: ir.Var, value: Any) -> Any:
    axes = varying_axes(graph, var)
    return value[tuple(slice(None) if d in axes else slice(0, 1) for d in range(value.ndim))]


def channel_vector(
    graph: ir.Graph, step: AffineStep, folded: dict[ir.Var, np.ndarray]
) -> np.ndarray:
    """The operand of an affine step as float64, [] or [C] in the order of the weight's channels."""
    operand = step.operand
    assert operand is not None
    value = operand.value if isinstance(operand, ir.Literal) else folded[operand]
    value = np.asarray(value).astype(np.float64)
    if value.ndim == 0:
        return value
    ascending = sorted(step.channels.axes)
    value = value.reshape([value.shape[a] for a in ascending])  # the other axes have size 1
    value = value.transpose([ascending.index(a) for a in step.channels.axes])
    return np.broadcast_to(value, step.channels.sizes).reshape(-1)
