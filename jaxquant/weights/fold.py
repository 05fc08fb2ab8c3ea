"""Evaluate what depends on parameters alone: weights on their way to a site, epilogue operands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.graph.copies import without_copies
from jaxquant.graph.model import Model
from jaxquant.graph.static_values import static_values
from jaxquant.jax_shim import prng
from jaxquant.plan.epilogue import AffineStep


def fold(
    graph: ir.Graph, params: Any, weights: Sequence[ir.Var], operands: Sequence[ir.Var]
) -> tuple[dict[ir.Var, np.ndarray], dict[ir.Var, np.ndarray]]:
    """The values of static tensors: weights of sites, epilogue operands.

    A weight comes as the operation takes it.  An operand that was broadcast along an axis (a bias
    spread over the batch) has size 1 there, so that nothing of the size of an activation is made.
    """
    weights, operands = list(dict.fromkeys(weights)), list(dict.fromkeys(operands))
    wanted = list(dict.fromkeys([*weights, *operands]))
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    given = jax.device_get({var: leaves[var] for var in wanted if var in leaves})
    known = static_values(graph, params, ir.upstream(graph, wanted))
    # What neither is a parameter nor known already is computed in one compiled function.
    left = [var for var in wanted if var not in given and var not in known]
    spread = set(left) - set(weights)
    found = {**known, **given, **_compiled(graph, leaves, left, spread)}

    def whole(var: ir.Var) -> np.ndarray:
        if prng.is_key_dtype(graph.dtype(var)):
            return found[var]  # of a dropout's layers; NumPy has no such arrays
        value = np.asarray(found[var], graph.dtype(var))
        return np.broadcast_to(value, graph.shape(var))

    return (
        {var: whole(var) for var in weights},
        {v: found[v] if v in spread else without_copies(graph, v, whole(v)) for v in operands},
    )


def leaves_of_layers(body: Model, outer: ir.Graph, params: Any) -> list[list[np.ndarray]]:
    """The values of the leaves of a loop's or a choice's body, as far as they are static outside.

    Args:
      body: the body.
      outer: the graph that holds the loop.
      params: the values of its leaves, as a pytree.

    Returns:
      For each layer of a scan over stacked weights, views of the stacked arrays; else one list.
    """
    operands = body.leaf_operands
    values, _ = fold(outer, params, list(operands.values()), [])
    return [
        [values[v][number] if var in body.sliced else values[v] for var, v in operands.items()]
        for number in range(body.layers or 1)
    ]


def _compiled(
    graph: ir.Graph,
    leaves: Mapping[ir.Var, Any],
    wanted: Sequence[ir.Var],
    spread: Collection[ir.Var],
) -> dict[ir.Var, np.ndarray]:
    """Values in one compiled call; of those in `spread` one along an axis of copies."""
    if not wanted:
        return {}
    table = evaluate.float_table(ir.upstream(graph, wanted))

    @jax.jit
    def run(leaves: Mapping[ir.Var, Any]) -> dict[ir.Var, Any]:
        env = evaluate.evaluate(graph, leaves, [None] * len(graph.inputs), table)
        values = {var: env.read(var) for var in wanted}
        return {v: without_copies(graph, v, x) if v in spread else x for v, x in values.items()}

    return jax.device_get(run(leaves))


def channel_vector(step: AffineStep, folded: dict[ir.Var, np.ndarray]) -> np.ndarray:
    """The operand of an affine step as float64, [C] in the order of the weight's channels.

    [] where it is a scalar, and where the site has no channels (a product of two activations): of
    an operand of any rank its one value is left then.
    """
    operand = step.operand
    assert operand is not None
    value = operand.value if isinstance(operand, ir.Literal) else folded[operand]
    value = np.asarray(value).astype(np.float64)
    if value.ndim == 0 or not step.channels.sizes:
        return value.reshape(())
    ascending = sorted(step.channels.axes)
    value = value.reshape([value.shape[a] for a in ascending])  # the other axes have size 1
    value = value.transpose([ascending.index(a) for a in step.channels.axes])
    return np.broadcast_to(value, step.channels.sizes).reshape(-1)
