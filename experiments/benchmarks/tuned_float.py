"""A float32 model in the forms that XLA runs fastest on CPU: what a user could do by hand."""

from collections.abc import Callable
from typing import Any

import jax

from jaxquant.graph import evaluate
from jaxquant.graph.float_forms import fast_convolutions
from jaxquant.graph.trace import trace


def tuned(apply_fn: Callable[..., Any], params: Any, x: Any) -> Callable[..., Any]:
    """The function `(params, x) -> outputs` for inputs of one shape."""
    graph = trace(apply_fn, params, (x,))
    rules = fast_convolutions(graph)

    def run(params: Any, x: Any) -> Any:
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        return evaluate.outputs(evaluate.evaluate(graph, leaves, [x], replace=rules))

    return run
