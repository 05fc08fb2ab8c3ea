"""The int8 program equation by equation, showing what reaches every site with a stored weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.backends.platforms import XLA
from jaxquant.graph import evaluate, ir
from jaxquant.plan.bind import Int8Site
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.program import Program

Visit = Callable[[Int8Site, jax.Array, int], None]


def run_stepwise(
    program: Program, qparams: Mapping[str, Any], inputs: Sequence[Any], visit: Visit
) -> None:
    """Run a program uncompiled, an equation at a time, and forget what is not read again.

    So whole calibration sets fit, and a site's arrays may change just before they are read.

    Args:
      program: without fused calls.
      qparams: its arrays.
      inputs: the flattened model inputs.
      visit: called with (site, x, zero_point) before each site with a stored weight; `x` is the
        site's int8 input.  It may change the arrays of that site in `qparams`.
    """
    last_reads = find_last_reads(program)
    dropped: set[ir.Var] = set(program.graph.output_vars)

    def forget(env: evaluate.Environment, now: int) -> None:
        for var, index in last_reads.items():
            if index < now and var not in dropped:
                env.drop(var)
                dropped.add(var)

    def hook(site: Int8Site, lowering: Lowering) -> Lowering:
        now = program.graph.producer[site.epilogue.output].index

        def visited(state: Evaluation) -> evaluate.Values:
            forget(state.env, now)
            if site.site.name not in program.calls:
                return lowering(state)
            each, var = program.calls[site.site.name], site.site.operands[0]
            visit(site, state.quantized.int8(var), program.binding.zero_points[var])
            compiled = jax.jit(functools.partial(XLA.call, each.call))
            return each.keep(state, compiled(each.operands(state)))

        return visited

    program.hooked(hook).run(qparams, inputs)


def find_last_reads(program: Program) -> dict[ir.Var, int]:
    """Tensor -> the index of the last equation that may read its float value."""
    graph, binding = program.graph, program.binding
    sites = {graph.producer[s.epilogue.output].index: s.site for s in binding.sites}
    last: dict[ir.Var, int] = {}
    for eqn in program.equations:
        site = sites.get(eqn.index)
        stack = [*(site.operands if site else eqn.input_vars)]
        if site and site.weight is not None:
            stack.append(site.weight)
        if eqn.index in binding.picks:
            stack += eqn.outputs
        while stack:
            var = stack.pop()
            last[var] = max(last.get(var, -1), eqn.index)
            source = graph.producer.get(var)
            is_moved = source is not None and source.index in binding.forms.moves
            if source is not None and (is_moved or var in program.early):
                stack += source.input_vars  # the int8 form is made when it is first read
    return last
