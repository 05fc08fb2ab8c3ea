"""Float convolutions in the forms that XLA runs fastest on CPU.

XLA's depthwise convolution is ten times slower there than a sum of shifted products, its 1x1
convolution slower than a dot (`experiments/benchmarks/latency.py` times whole networks so).  The
calibration sweep and the comparison of the float with the int8 model run the float model this way:
the same values but for the order in which a sum is rounded.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import evaluate, ir

_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# A depthwise window of at most this many taps runs as shifted products.
_MAX_TAPS = 64


def fast_convolutions(graph: ir.Graph) -> dict[int, evaluate.Replace]:
    """Rules for the convolutions of a graph that have a faster form here; none but on CPU."""
    if jax.default_backend() != "cpu":
        return {}
    return {
        eqn.index: rule
        for eqn in graph.equations
        if eqn.name == "conv_general_dilated" and (rule := _rule(graph, eqn)) is not None
    }


def evaluate_float(
    graph: ir.Graph,
    params: Any,
    inputs: Sequence[Any],
    *,
    equations: Sequence[ir.Equation] | None = None,
) -> evaluate.Environment:
    """The values of a float model, with its convolutions in their faster forms.

    Args:
      graph: the traced model.
      params: its parameters, in the pytree that it was traced with.
      inputs: the flattened model inputs.
      equations: those to evaluate, in order; by default all.
    """
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    rules = fast_convolutions(graph)
    return evaluate.evaluate(graph, leaves, inputs, equations=equations, replace=rules)


def _rule(graph: ir.Graph, eqn: ir.Equation) -> evaluate.Replace | None:
    params, kernel = eqn.params, graph.shape(eqn.inputs[1])
    spec, groups = params["dimension_numbers"], params["feature_group_count"]
    if (
        (spec.lhs_spec, spec.rhs_spec, spec.out_spec) != _NHWC
        or params["batch_group_count"] != 1
        or {*params["lhs_dilation"], *params["rhs_dilation"]} != {1}
        or any(graph.dtype(atom) != jnp.float32 for atom in (*eqn.inputs, *eqn.outputs))
    ):
        return None
    unpadded = all(pads == (0, 0) for pads in params["padding"])
    if kernel[:2] == (1, 1) and groups == 1 and unpadded:
        return _pointwise
    taps, fits = kernel[0] * kernel[1], min(graph.shape(eqn.outputs[0])[1:3]) > 0
    if kernel[2:] == (1, groups) and groups > 1 and taps <= _MAX_TAPS and fits:
        return _depthwise
    return None


def _pointwise(env: evaluate.Environment, eqn: ir.Equation) -> Sequence[Any]:
    x, kernel = (env.read(atom) for atom in eqn.inputs)
    rows, columns = eqn.params["window_strides"]
    contract = (((3,), (0,)), ((), ()))
    precision = eqn.params["precision"]
    return [lax.dot_general(x[:, ::rows, ::columns], kernel[0, 0], contract, precision=precision)]


def _depthwise(env: evaluate.Environment, eqn: ir.Equation) -> Sequence[Any]:
    x, kernel = (env.read(atom) for atom in eqn.inputs)
    x = _padded(x, eqn.params)
    rows, columns = eqn.params["window_strides"]
    height, width = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    terms = [
        x[:, i : i + height : rows, j : j + width : columns] * kernel[i, j, 0]
        for i, j in itertools.product(*map(range, kernel.shape[:2]))
    ]
    return [functools.reduce(operator.add, terms)]


def _padded(x: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    config = [(0, 0, 0), *((*pads, 0) for pads in params["padding"]), (0, 0, 0)]
    return lax.pad(x, jnp.float32(0), config)
