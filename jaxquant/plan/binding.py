"""A plan as it is in a model: which equations, tensors and grids it names there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.epilogue import Epilogue
from jaxquant.plan.forms import Forms
from jaxquant.plan.plan import INT8, Plan, TensorPlan
from jaxquant.plan.restore import Restored


@dataclasses.dataclass(frozen=True)
class Int8Site:
    """A quantized site with an accumulator or a weight: what `quantize` and `run` work from.

    Attributes:
      site: it.
      epilogue: what its multiplier and bias stand for; of an embedding, which has neither, its end
        is the embedding's result.
      dynamic: what it reads is scaled in each call.
      asymmetric: on grids with a zero point.
    """

    site: Site
    epilogue: Epilogue
    dynamic: bool
    asymmetric: bool = False

    @property
    def with_scales(self) -> tuple[ir.Var, ...]:
        """What it reads on grids of the plan."""
        return () if self.dynamic else self.site.operands


@dataclasses.dataclass(frozen=True)
class Binding:
    """A plan in a model.

    Attributes:
      model: what was bound.
      plan: its part in the model's own graph, without that in loops and choices.
      sites: the quantized sites that accumulate or that have a weight.
      picks: the indices of the equations of int8 sites that pick values.
      decisions: the indices of the equations of int8 sites that decide (argmax, comparisons).
      forms: which tensors are int8.
      names: entry tensor -> its name in the plan and in `qparams["tensors"]`.
      scales: int8 tensor -> the name of the entry that holds its scale.
      zero_points: int8 tensor -> the int8 that stands for zero.
      restorable: the static tensors that follow from a stored weight.
      per_channel: the int8 tensors whose scale varies along channels: they are divided by channel.
      bodies: the plan in loops and choices, by the index of their equation.
      layer: of a body, which one of the layers of the scans around it.
    """

    model: Model
    plan: Plan
    sites: tuple[Int8Site, ...]
    picks: frozenset[int]
    decisions: frozenset[int]
    forms: Forms
    names: Mapping[ir.Var, str]
    scales: Mapping[ir.Var, str]
    zero_points: Mapping[ir.Var, int]
    restorable: Mapping[ir.Var, Restored]
    per_channel: frozenset[ir.Var]
    bodies: Mapping[int, tuple[BoundBody, ...]] = dataclasses.field(default_factory=dict)
    layer: tuple[int, ...] = ()

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    @functools.cached_property
    def whole_plan(self) -> Plan:
        """The plan with its parts in the bodies, the sites in evaluation order."""
        if not self.bodies:
            return self.plan
        places = {site.name: site.location for site in self.model.whole.located}
        sites = [site for layer in self._plans() for site in layer.sites]
        once = {site.name: site for site in sites}  # there once for each layer
        return dataclasses.replace(
            self.plan,
            sites=tuple(sorted(once.values(), key=lambda site: places[site.name])),
            tensors=tuple(tensor for layer in self._plans() for tensor in layer.tensors),
        )

    def _plans(self) -> Iterator[Plan]:
        """The plans of all layers, their tensors named after these."""
        for bound in self.all_layers():
            tensors = tuple(tensor.in_layer(bound.layer) for tensor in bound.plan.tensors)
            yield dataclasses.replace(bound.plan, tensors=tensors)

    def all_layers(self) -> Iterator[Binding]:
        """Itself and all layers of all its bodies."""
        yield self
        for body in (body for bodies in self.bodies.values() for body in bodies):
            for layer in body.layers:
                yield from layer.all_layers()

    def weight_slots(self, params: Any) -> Mapping[str, layout.WeightSlot]:
        """Where the weights of its sites are, those of its bodies too; of a whole model.

        Args:
          params: the parameters or their shapes.
        """
        return _weight_slots(self, tuple(layout.leaf_paths(self.graph, params).values()))

    def all_graphs(self) -> Iterator[Binding]:
        """Itself and the first layer of all its bodies: what there is a program of."""
        yield self
        for body in (body for bodies in self.bodies.values() for body in bodies):
            # All layers have one program, so that the first stands for them.
            yield from body.layers[0].all_graphs()

    def in_bodies(self, change: Callable[[Binding], Binding]) -> Binding:
        """The same with its bodies changed."""
        bodies = {
            index: tuple(
                dataclasses.replace(body, layers=tuple(map(change, body.layers))) for body in bodies
            )
            for index, bodies in self.bodies.items()
        }
        return dataclasses.replace(self, bodies=bodies)

    @property
    def holds_int8(self) -> bool:
        """Whether a site in it or in its bodies is quantized."""
        inside = (body.layers[0] for bodies in self.bodies.values() for body in bodies)
        return any(site.status == INT8 for site in self.plan.sites) or any(
            layer.holds_int8 for layer in inside
        )

    def with_tensors(self, tensors: Sequence[TensorPlan]) -> Binding:
        """The same tensors on other grids."""
        zero_points, per_channel = on_grids(self.scales, tensors)
        return dataclasses.replace(
            self,
            plan=dataclasses.replace(self.plan, tensors=tuple(tensors)),
            zero_points=zero_points,
            per_channel=per_channel,
        )


@once
def _weight_slots(
    binding: Binding, paths: tuple[tuple[str, ...], ...]
) -> Mapping[str, layout.WeightSlot]:
    # Found once for a binding and these paths: every caller asks for them.
    parts = [(part.model, [each.site for each in part.sites]) for part in binding.all_graphs()]
    return layout.weight_slots(parts, paths, binding.whole_plan)


@dataclasses.dataclass(frozen=True)
class BoundBody:
    """The plan of a body of a loop or a choice.

    Attributes:
      model: the body.
      layers: its binding; where the weights are stacked, one for each layer, which differ in the
        grids of the tensors alone.
    """

    model: Model
    layers: tuple[Binding, ...]

    def shared_weights(self, slots: Mapping[str, layout.WeightSlot]) -> set[tuple[str, ...]]:
        """Where in `qparams` the weights are that its layers have in common.

        Args:
          slots: of the whole model.
        """
        found: set[tuple[str, ...]] = set()
        if self.model.layers is None:
            return found
        # Scans are numbered from outside in: this loop's own axis is the last one.
        level = len(self.model.scans) - 1
        for part in self.layers[0].all_graphs():
            for each in part.sites:
                site = each.site
                if site.name not in slots or site.weight is None:
                    continue
                # By the scans around the weight: what varies along an outer one only is shared
                # here.
                if not part.model.varies_by_layer(site.weight)[level]:
                    slot = slots[site.name]
                    found |= {("params", *slot.int8), ("params", *slot.scale)}
        return found


def on_grids(
    scales: Mapping[ir.Var, str], tensors: Sequence[TensorPlan]
) -> tuple[dict[ir.Var, int], frozenset[ir.Var]]:
    """The zero point of every int8 tensor, and those tensors whose scale varies along channels."""
    zero_points = {tensor.name: tensor.zero_point for tensor in tensors}
    divided = {tensor.name for tensor in tensors if tensor.channels}
    return (
        {var: zero_points[name] for var, name in scales.items()},
        frozenset(var for var, name in scales.items() if name in divided),
    )
