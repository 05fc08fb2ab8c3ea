"""Loops and choices with int8 sites inside: the loop stays a loop, its body is an int8 program.

A scan over stacked weights goes over the stacked arrays of its sites too, so that each step has
those of one layer; what other loops hold is the same in all their steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir
from jaxquant.graph import loops as graph_loops
from jaxquant.graph.model import Model
from jaxquant.plan import layout
from jaxquant.plan.binding import Binding
from jaxquant.run.lowerings import Evaluation, Lowering


@dataclasses.dataclass(frozen=True)
class Inside:
    """Where the program of a body is.

    Attributes:
      layers: its bindings in all layers of all the scans around it, which differ in their grids.
      slots: where the weights of the whole model are.
      shared: the paths of the weights that the layers of its own scan have in common.
    """

    layers: tuple[Binding, ...]
    slots: Mapping[str, layout.WeightSlot]
    shared: Collection[tuple[str, ...]] = ()

    @property
    def varies(self) -> bool:
        """Whether the layers have different zero points, so that these are no constants."""
        return any(layer.zero_points != self.layers[0].zero_points for layer in self.layers)

    @property
    def per_channel(self) -> frozenset[ir.Var]:
        """The tensors that are divided by channel in some layer, and so by ones in the others."""
        return frozenset[ir.Var]().union(*(layer.per_channel for layer in self.layers))


class BodyProgram(Protocol):
    """The program of a body; a `jaxquant.run.program.Program` is one."""

    model: Model
    binding: Binding
    body: Inside

    def results(
        self, qparams: Mapping[str, Any], leaves: Mapping[ir.Var, Any], inputs: Sequence[Any]
    ) -> list[Any]: ...

    def pack(self, qparams: Mapping[str, Any]) -> dict[str, jax.Array]: ...


def lowering(eqn: ir.Equation, bodies: Sequence[BodyProgram]) -> Lowering:
    """The lowering of a loop or choice.

    Args:
      eqn: its equation.
      bodies: the programs of its bodies.
    """

    def run(state: Evaluation) -> evaluate.Values:
        env = state.env
        # What int8 sites alone read was never computed in float.
        operands = [
            env.read(x) if isinstance(x, ir.Literal) or x in env else None for x in eqn.inputs
        ]
        arrays = [arrays_of(body, state.qparams) for body in bodies]

        # The arrays of layers go through the scan beside the model's own stacked operands.
        steps = [_step(body, every) for body, (every, _) in zip(bodies, arrays, strict=True)]
        found = graph_loops.run(eqn, operands, steps, sliced=arrays[0][1])
        return dict(zip(eqn.outputs, found.results, strict=True))

    return run


def _step(body: BodyProgram, every: Mapping[str, Any]) -> graph_loops.Step:
    """One step of an int8 program.

    Args:
      body: the program.
      every: the arrays that are the same in all steps.
    """

    def step(given: graph_loops.Given) -> graph_loops.Gives:
        qparams = layout.joined(every, given.sliced or {})
        return graph_loops.Gives(body.results(qparams, *body.model.root.split(given.values)))

    return step


def arrays_of(
    body: BodyProgram, qparams: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays of the sites of a body: those of all its steps, and those with a layer for each.

    Args:
      body: the program of the body.
      qparams: the arrays of the model around it.
    """
    every: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    stacked: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    # A scan over stacked weights reads one layer's arrays in each step, other loops all of them;
    # weights that layers share are not stacked either.
    layered = body.model.layers is not None
    # The graphs of bodies inside too: nested loops find their arrays in the same dicts.
    for part in body.binding.all_graphs():
        for name in (site.name for site in part.plan.sites):
            if name in body.body.slots:
                slot = body.body.slots[name]
                for path in (slot.int8, slot.scale):
                    one = every if not layered or ("params", *path) in body.body.shared else stacked
                    layout.put(one["params"], path, layout.get(qparams["params"], path))
            for entry in (each for each in qparams if each not in ("params", "tensors")):
                if name in qparams[entry]:
                    # A weight that the layers share is stored once, so it is packed once.
                    in_all = entry == "packed" and _is_shared(body, name)
                    one = stacked if layered and not in_all else every
                    one.setdefault(entry, {})[name] = qparams[entry][name]
        for tensor in part.plan.tensors:
            one = stacked if layered else every
            one["tensors"][tensor.name] = qparams["tensors"][tensor.name]
    return every, stacked


def pack(body: BodyProgram, qparams: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The packed weights of a body, stacked as the weights themselves are.

    Args:
      body: the program of the body.
      qparams: the arrays of the model around it.
    """
    every, stacked = arrays_of(body, qparams)
    if body.model.layers is None:
        return body.pack(every)
    # Kernels pack one matrix at a time; the stack has one for each layer.
    layers = [
        body.pack(layout.joined(every, jax.tree.map(lambda x, n=number: x[n], stacked)))
        for number in range(body.model.layers)
    ]
    return {
        name: first if _is_shared(body, name) else jnp.stack([layer[name] for layer in layers])
        for name, first in layers[0].items()
    }


def _is_shared(body: BodyProgram, name: str) -> bool:
    """Whether the layers of a body have the weight of a site in common."""
    # By the weight's path: a tied weight is one array, whichever site reads it.
    slots = body.body.slots
    return name in slots and ("params", *slots[name].int8) in body.body.shared
