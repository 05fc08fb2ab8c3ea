"""A float32 model in the forms that XLA runs fastest on CPU: what a user could do by hand.

1x1 convolutions as dots, depthwise ones as shifted multiply-adds.
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxquant.graph import evaluate, ir
from jaxquant.graph.trace import trace

_NHWC = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def tuned(apply_fn: Callable[..., Any], params: Any, x: Any) -> Callable[..., Any]:
    """The function `(params, x) -> outputs` for inputs of one shape."""
    graph = trace(apply_fn, params, (x,))
    rules = {
        eqn.index: _convolution for eqn in graph.equations if eqn.name == "conv_general_dilated"
    }

    def run(params: Any, x: Any) -> Any:
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        return evaluate.outputs(evaluate.evaluate(graph, leaves, [x], replace=rules))

    return run


def _convolution(env: evaluate.Environment, eqn: ir.Equation) -> Any:
    x, kernel = (env.read(atom) for atom in eqn.inputs)
    params = eqn.params
    spec = params["dimension_numbers"]
    plain = (
        (spec.lhs_spec, spec.rhs_spec, spec.out_spec) == _NHWC
        and params["batch_group_count"] == 1
        and {*params["lhs_dilation"], *params["rhs_dilation"]} == {1}
    )
    groups = params["feature_group_count"]
    if plain and kernel.shape[:2] == (1, 1) and groups == 1 and _unpadded(params):
        rows, columns = params["window_strides"]
        return [lax.dot_general(x[:, ::rows, ::columns], kernel[0, 0], (((3,), (0,)), ((), ())))]
    if plain and kernel.shape[2:] == (1, groups) and groups > 1:
        return [_depthwise(x, kernel, params)]
    return evaluate.apply(env, eqn)


def _unpadded(params: Any) -> bool:
    return all(pads == (0, 0) for pads in params["padding"])


def _depthwise(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array:
    x = lax.pad(x, x.dtype.type(0), [(0, 0, 0), *((*p, 0) for p in params["padding"]), (0, 0, 0)])
    rows, columns = params["window_strides"]
    height, width = x.shape[1] - kernel.shape[0] + 1, x.shape[2] - kernel.shape[1] + 1
    terms = [
        x[:, i : i + height : rows, j : j + width : columns] * kernel[i, j, 0]
        for i, j in itertools.product(*map(range, kernel.shape[:2]))
    ]
    return functools.reduce(operator.add, terms)
