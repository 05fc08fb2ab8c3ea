"""A float32 model in the forms that XLA runs fastest on CPU: what a user could do by hand."""

from collections.abc import Callable
from typing import Any

from jaxquant.graph import evaluate
from jaxquant.graph.trace import trace
from jaxquant.run.float_forms import evaluate_float


def tuned(apply_fn: Callable[..., Any], params: Any, x: Any) -> Callable[..., Any]:
    """The function `(params, x) -> outputs` for inputs of one shape."""
    graph = trace(apply_fn, params, (x,))
    return lambda params, x: evaluate.outputs(evaluate_float(graph, params, [x], natively=False))
