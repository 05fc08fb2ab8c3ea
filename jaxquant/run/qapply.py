"""`qapply`: the int8 model as a pure function of `(qparams, *inputs)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxquant.graph import evaluate, ir
from jaxquant.graph.trace import trace
from jaxquant.plan.plan import Plan
from jaxquant.run.program import Program


class QuantizedApply:
    """The quantized counterpart of `apply_fn`; made by `jaxquant.quant_post`.

    A pure function: `qapply(qparams, *inputs)` takes any batch size and input shape that gives the
    same sites, and works under `jit`, `vmap` and `shard_map`.  It compiles itself once per input
    shape, so calling it outside `jit` is fine too.

    Attributes:
      plan: which sites are int8, and with which scales.
      inputs: the shapes and dtypes of the inputs that it was quantized with; None if not known.
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        plan: Plan,
        params: Any,
        report: Any,
        inputs: tuple[Any, ...] | None = None,
    ):
        self.plan = plan
        self.inputs = None if inputs is None else jax.tree.map(ir.struct, inputs)
        self._apply_fn = apply_fn
        self._params = jax.tree.map(ir.struct, params)
        self._report = report
        self.__name__ = "qapply"

        def int8_model(qparams: Mapping[str, Any], *inputs: Any) -> Any:
            env = self.program(*inputs).run(qparams, jax.tree.leaves(inputs))
            return evaluate.outputs(env)

        self._jitted = jax.jit(int8_model)

    def __call__(self, qparams: Mapping[str, Any], *inputs: Any) -> Any:
        """The model's outputs for `inputs`, which are those of `apply_fn` after its params."""
        self.check(qparams)
        return self._jitted(qparams, *inputs)

    def check(self, qparams: Mapping[str, Any]) -> None:
        """Raise ValueError where the qparams are of another plan."""
        check_qparams(qparams, self.plan)

    def program(self, *inputs: Any) -> Program:
        """The int8 program for inputs of these shapes.

        Raises:
          ValueError: these shapes give another graph than the one that was quantized.
        """
        return Program(trace(self._apply_fn, self._params, inputs), self.plan, self._params)

    def report(self) -> Any:
        """Every site, int8 or why not, with its scales and SQNR; prints as a table."""
        return self._report


def check_qparams(qparams: Mapping[str, Any], plan: Plan) -> None:
    """Raise ValueError where something is not the qparams of a plan."""
    if not isinstance(qparams, Mapping) or set(qparams) != {"params", "sites", "tensors"}:
        raise ValueError(
            "qapply takes the qparams that quant_post returned beside it (a dict of 'params', "
            f"'sites' and 'tensors'), got {_describe(qparams)}"
        )
    tensors = {tensor.name for tensor in plan.tensors}
    sites = {site.name for site in plan.sites if site.fingerprint}
    differing = (tensors ^ set(qparams["tensors"])) | (sites ^ set(qparams["sites"]))
    if differing:
        raise ValueError(
            "these qparams belong to another model or plan than this qapply: "
            f"{', '.join(sorted(differing)[:5])} differ"
        )


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))[:5]}"
    return type(value).__name__
