"""The int8 program equation by equation, showing what reaches every site with a stored weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant.backends.platforms import XLA
from jaxquant.graph import evaluate, ir, loops
from jaxquant.plan.binding import Int8Site
from jaxquant.run.layers import GraphLayer
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.program import Program

Visit = Callable[[GraphLayer, Int8Site, jax.Array], None]
Enter = Callable[[GraphLayer, int], None]


def run_stepwise(part: GraphLayer, inputs: Sequence[Any], visit: Visit, enter: Enter) -> None:
    """Run a program uncompiled, an equation at a time, and forget what is not read again.

    So whole calibration sets fit, and a site's arrays may change just before they are read.  Of a
    scan over stacked weights one layer runs after the other; another loop, and a choice, runs as a
    whole.

    Args:
      part: the whole model; its program is one by site, which computes no equations together.
      inputs: the flattened model inputs.
      visit: called with (part, site, x) before each site with a stored weight; `x` is the site's
        int8 input.  It may change the arrays of that site in the part's `qparams`.
      enter: called with (part, index of its equation) before a loop or choice that runs as a whole.
        It may change the arrays of the sites inside, which `part.inside` has.
    """
    run = _Stepwise(visit, enter)
    run.program_of(part).run(part.qparams, inputs)


class _Stepwise:
    def __init__(self, visit: Visit, enter: Enter) -> None:
        self._visit = visit
        self._enter = enter
        self._compiled: dict[str, Callable[..., Any]] = {}  # the layers of a site have one call

    def program_of(self, part: GraphLayer) -> Program:
        """The program of a part that shows what reaches its sites."""
        program, forget = part.program, _forgetting(part.program)

        def hook(site: Int8Site, lowering: Lowering) -> Lowering:
            name, now = site.site.name, program.graph.producer[site.epilogue.output].index

            def visited(state: Evaluation) -> evaluate.Values:
                forget(state.env, now)
                # A site that no call stands for is rounded in the call, and has nothing to show.
                if name not in program.calls:
                    return lowering(state)
                each = program.calls[name]
                self._visit(part, site, state.quantized.int8(site.site.operands[0]))
                if name not in self._compiled:
                    # Compiled by site, since the arrays of the next ones change as their rounding
                    # is learned.
                    self._compiled[name] = jax.jit(functools.partial(XLA.call, each.call))
                return each.keep(state, self._compiled[name](each.operands(state)))

            return visited

        def looped(index: int) -> Lowering:
            in_turn = program.bodies[index][0].model.layers is not None
            lowering = self._layers(part, index) if in_turn else self._whole(part, index)

            def looping(state: Evaluation) -> evaluate.Values:
                forget(state.env, index)
                return lowering(state)

            return looping

        return program.hooked(hook).replacing({index: looped(index) for index in program.bodies})

    def _whole(self, part: GraphLayer, index: int) -> Lowering:
        """The lowering of a loop or choice that runs as a whole."""
        lowering = part.program.lowerings[index]

        def entered(state: Evaluation) -> evaluate.Values:
            self._enter(part, index)
            return lowering(state)

        return entered

    def _layers(self, part: GraphLayer, index: int) -> Lowering:
        """The lowering of a scan over stacked weights, whose layers run in turn."""
        eqn = part.program.graph.equations[index]

        def lowering(state: Evaluation) -> evaluate.Values:
            # Anew in each call: arrays of layers are views of the ones that change.
            layers = list(part.inside(index))

            def step(number: int, values: Sequence[Any]) -> Sequence[Any]:
                layer = layers[number]
                leaves, inputs = layer.program.model.root.split(values)
                return self.program_of(layer).results(layer.qparams, leaves, inputs)

            # What only int8 sites read is there in no float form.
            operands = [
                state.env.read(x) if isinstance(x, ir.Literal) or x in state.env else None
                for x in eqn.inputs
            ]
            results = loops.run_in_turn(eqn, operands, step)
            return dict(zip(eqn.outputs, results, strict=True))

        return lowering


def _forgetting(program: Program) -> Callable[[evaluate.Environment, int], None]:
    """A function that drops the values of an evaluation that nothing reads from an equation on."""
    last_reads = find_last_reads(program)
    dropped: set[ir.Var] = set(program.graph.output_vars)

    def forget(env: evaluate.Environment, now: int) -> None:
        for var, index in last_reads.items():
            # By then the last reader has run.
            if index < now and var not in dropped:
                env.drop(var)
                dropped.add(var)

    return forget


def find_last_reads(program: Program) -> dict[ir.Var, int]:
    """Tensor -> the index of the last equation that may read its float value."""
    graph, binding = program.graph, program.binding
    sites = {graph.producer[s.epilogue.output].index: s.site for s in binding.sites}
    last: dict[ir.Var, int] = {}
    for eqn in program.equations:
        site = sites.get(eqn.index)
        own = graph.equations[site.equation] if site else eqn
        stack = [*own.input_vars]
        if site and site.weight is not None:
            # A weight that the program computes is read too.
            stack.append(site.weight)
        if eqn.index in binding.picks:
            stack += eqn.outputs
        # A tensor that is read in int8 is read in float when its int8 form is first made.
        while stack:
            var = stack.pop()
            last[var] = max(last.get(var, -1), eqn.index)
            source = graph.producer.get(var)
            is_moved = source is not None and source.index in binding.forms.moves
            if source is not None and (is_moved or var in program.early):
                stack += source.input_vars  # the int8 form is made when it is first read
    return last
