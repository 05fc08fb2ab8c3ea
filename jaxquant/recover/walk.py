"""The int8 program equation by equation, showing what reaches every site with a stored weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.plan import Plan
from jaxquant.run import int8
from jaxquant.run.epilogue import epilogue
from jaxquant.run.program import Program
from jaxquant.run.quantized import QuantizedTensors

Visit = Callable[[Int8Site, jax.Array, int], None]


class Walk(Program):
    """A program that runs uncompiled, an equation at a time, and forgets what is not read again.

    So whole calibration sets fit, and a site's arrays may change just before they are read.
    """

    def __init__(self, graph: ir.Graph, plan: Plan, params: Any):
        super().__init__(graph, plan, params)
        self._last_reads = self._find_last_reads()
        self._visit: Visit | None = None
        self._dropped: set[ir.Var] = set()

    def walk(self, qparams: Mapping[str, Any], inputs: Sequence[Any], visit: Visit) -> None:
        """Run on `inputs`, calling `visit(site, x, zero_point)` before each such site.

        `x` is the site's int8 input; `visit` may change the arrays of that site in `qparams`.
        """
        self._visit, self._dropped = visit, set()
        self.run(qparams, inputs)

    def _accumulate(
        self,
        int8_site: Int8Site,
        qparams: Mapping[str, Any],
        env: evaluate.Environment,
        quantized: QuantizedTensors,
    ) -> jax.Array:
        self._forget(env, self.graph.producer[int8_site.epilogue.output].index)
        site = int8_site.site
        if site.name not in self.slots:
            return super()._accumulate(int8_site, qparams, env, quantized)
        eqn, var = self.graph.equations[site.equation], site.operands[0]
        x, zero = quantized.int8(var), quantized.zero_point(var)
        assert self._visit is not None
        self._visit(int8_site, x, zero)
        weight = layout.get(qparams["params"], self.slots[site.name].int8)

        @jax.jit
        def accumulate(x: jax.Array, weight: jax.Array, arrays: Any) -> jax.Array:
            operands = [x, weight] if site.weight_position else [weight, x]
            value = int8.accumulate(eqn, operands, [zero]).astype(jnp.float32)
            return epilogue(int8_site, value, arrays)

        return accumulate(x, weight, qparams["sites"][site.name])

    def _find_last_reads(self) -> dict[ir.Var, int]:
        """Tensor -> the index of the last equation that may read its float value."""
        graph, forms = self.graph, self.binding.forms
        last: dict[ir.Var, int] = {}
        for eqn in self.equations:
            site = self._by_index.get(eqn.index)
            stack = [*(site.site.operands if site else eqn.input_vars)]
            if site and site.site.weight is not None:
                stack.append(site.site.weight)
            if eqn.index in self.binding.selects:
                stack += eqn.outputs
            while stack:
                var = stack.pop()
                last[var] = max(last.get(var, -1), eqn.index)
                source = graph.producer.get(var)
                if source is not None and (source.index in forms.moves or var in self.early):
                    stack += source.input_vars  # the int8 form is made when it is first read
        return last

    def _forget(self, env: evaluate.Environment, now: int) -> None:
        for var, index in self._last_reads.items():
            if index < now and var not in self._dropped and var not in self.graph.output_vars:
                env.drop(var)
                self._dropped.add(var)
