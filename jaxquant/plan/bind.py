"""Find a plan in a graph again, which may be traced for another input shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxquant.graph import ir, kinds
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours, layout
from jaxquant.plan.epilogue import Epilogue, find_epilogue, fingerprint
from jaxquant.plan.forms import Forms, find_forms
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import INT8, Plan, SitePlan, TensorPlan
from jaxquant.plan.restore import Restored, restorable


@dataclasses.dataclass(frozen=True)
class Int8Site:
    """A quantized site with an accumulator or a weight: what `quantize` and `run` work from.

    Attributes:
      site: it.
      epilogue: what its multiplier and bias stand for.
      dynamic: what it reads is scaled in each call.
    """

    site: Site
    epilogue: Epilogue
    dynamic: bool

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
        sites = [site for part in self._parts() for site in part.sites]
        once = {site.name: site for site in sites}  # there once for each layer
        return dataclasses.replace(
            self.plan,
            sites=tuple(sorted(once.values(), key=lambda site: places[site.name])),
            tensors=tuple(tensor for part in self._parts() for tensor in part.tensors),
        )

    def _parts(self) -> Iterator[Plan]:
        for part in self.all_layers():
            tensors = tuple(tensor.in_layer(part.layer) for tensor in part.plan.tensors)
            yield dataclasses.replace(part.plan, tensors=tensors)

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
        zero_points, per_channel = _of_grids(self.scales, tensors)
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
        level = len(self.model.scans) - 1
        for part in self.layers[0].all_graphs():
            for each in part.sites:
                site = each.site
                if site.name not in slots or site.weight is None:
                    continue
                if not part.model.varies_by_layer(site.weight)[level]:
                    slot = slots[site.name]
                    found |= {("params", *slot.int8), ("params", *slot.scale)}
        return found


def _of_grids(
    scales: Mapping[ir.Var, str], tensors: Sequence[TensorPlan]
) -> tuple[dict[ir.Var, int], frozenset[ir.Var]]:
    """The zero point of every int8 tensor, and those tensors whose scale varies along channels."""
    zero_points = {tensor.name: tensor.zero_point for tensor in tensors}
    divided = {tensor.name for tensor in tensors if tensor.channels}
    return (
        {var: zero_points[name] for var, name in scales.items()},
        frozenset(var for var, name in scales.items() if name in divided),
    )


def bind(model: Model, plan: Plan) -> Binding:
    """Find the plan's sites and tensors in a model, which may be traced for another input shape.

    Raises:
      ValueError: the graph has other sites or int8 tensors than the plan.
    """
    known = {site.name for site in model.located}
    differing = [site.name for site in plan.sites if site.name not in known]
    # Which rearrangements there are may depend on the batch; the int8 tensors are compared.
    if lost := [name for name in differing if not kinds.is_layout(_kind(plan, name))]:
        raise _other_graph(lost)
    binding = _bind(model, plan, ())
    tensors = {tensor.name for tensor in binding.whole_plan.tensors}
    if strange := {tensor.name for tensor in plan.tensors} ^ tensors:
        raise _other_graph(strange)
    return binding


def _kind(plan: Plan, name: str) -> str:
    return next(site.kind for site in plan.sites if site.name == name)


def _bind(model: Model, plan: Plan, layer: tuple[int, ...]) -> Binding:
    """Bind the part of a whole plan that is in a model, for one layer of the scans around it."""
    bodies = {
        index: tuple(_bind_body(body, plan, layer) for body in inside)
        for index, inside in model.bodies.items()
    }
    binding = _bind_graph(model, part_of(plan, model, layer), _stored_inside(model, bodies))
    return dataclasses.replace(binding, bodies=bodies, layer=layer)


def _stored_inside(
    model: Model, bodies: Mapping[int, tuple[BoundBody, ...]]
) -> dict[ir.Var, Restored]:
    """How the operands of loops and choices follow from what is stored for the sites in these."""
    found = {}
    for body in (body for inside in bodies.values() for body in inside):
        restored = body.layers[0].restorable
        for leaf, operand in body.model.leaf_operands.items():
            if leaf in restored:
                slices = model.graph.shape(operand)[0] if leaf in body.model.sliced else None
                site, inside = restored[leaf].site, restored[leaf]
                found[operand] = Restored(site, model.graph, (), inside, slices)
    return found


def _bind_body(body: Model, plan: Plan, around: tuple[int, ...]) -> BoundBody:
    """Bind the layers of a body, for one layer of the scans around it."""
    layer, *others = layers_of(body, around)
    first = _bind(body, plan, layer)
    if first.bodies:
        return BoundBody(body, (first, *(_bind(body, plan, other) for other in others)))
    rest = (
        dataclasses.replace(first.with_tensors(part_of(plan, body, other).tensors), layer=other)
        for other in others
    )
    return BoundBody(body, (first, *rest))


def layers_of(body: Model, around: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The layers of a body, for one layer of the scans around it."""
    if body.layers is None:
        return [around]
    return [(*around, number) for number in range(body.layers)]


def part_of(plan: Plan, model: Model, layer: tuple[int, ...]) -> Plan:
    """The part of a whole plan in a model's own graph, its tensors with their plain names."""
    own = {site.name for site in model.with_lookups if not is_elsewhere(model, site)}
    suffix = layer_suffix(layer)
    entries = {f"{name}{suffix}" for name in model.names.values()}
    return dataclasses.replace(
        plan,
        sites=tuple(site for site in plan.sites if site.name in own),
        tensors=tuple(tensor.by_itself() for tensor in plan.tensors if tensor.name in entries),
    )


def is_elsewhere(model: Model, site: Site) -> bool:
    """True for a site that is in a body of its own model."""
    return bool(site.inside) and site.name in model.in_bodies


def _bind_graph(model: Model, plan: Plan, inside: Mapping[ir.Var, Restored]) -> Binding:
    """Bind what is in a model's own graph; for `inside` see `jaxquant.plan.restore.restorable`."""
    graph, mode = model.graph, MODES[plan.mode]
    planned = {site.name: site for site in plan.sites}
    found = [
        _as_planned(site, planned)
        for site in model.sites_of(mode.lookups)
        if not is_elsewhere(model, site)
    ]
    here = {site.name: site for site in found}
    differing = [
        name
        for name, plan_of_site in planned.items()
        # Which rearrangements there are may depend on the batch; the int8 tensors are compared.
        if not kinds.is_layout(plan_of_site.kind)
        and (name not in here or not _is_kind(here[name], plan_of_site))
    ]
    dots = [site for site in found if site.kind in kinds.DOT_KINDS]
    differing += [site.name for site in dots if site.name not in planned]
    if differing:
        raise _other_graph(differing)
    chosen = [s for s in found if s.name in planned and planned[s.name].status == INT8]
    barred = {
        s.equation
        for s in found
        if s.name in planned and planned[s.name].status != INT8 and not s.inside
    }
    static = [site for site in chosen if not planned[site.name].dynamic]
    forms = find_forms(model, static if mode.tensor_scales else (), plan.kinds, barred)
    names = model.names
    entries = {var: names[var] for var in forms.entries}
    if set(entries.values()) != {tensor.name for tensor in plan.tensors}:
        raise _other_graph(set(entries.values()) ^ {tensor.name for tensor in plan.tensors})
    bound, by_behaviour = [], {behaviours.PICK: set[int](), behaviours.DECIDE: set[int]()}
    for site in chosen:
        behaviour = behaviours.behaviour_of(site.kind, graph.equations[site.equation])
        if behaviour in (behaviours.ACCUMULATE, behaviours.LOOK_UP):
            affine = planned[site.name].affine
            epilogue = find_epilogue(graph, site, steps_at_most=len(affine))
            known = fingerprint(graph, site, epilogue) == planned[site.name].fingerprint
            if epilogue.affine != affine or not known:
                raise _other_graph([site.name])
            is_dynamic = not mode.tensor_scales or planned[site.name].dynamic
            bound.append(Int8Site(site, epilogue, is_dynamic))
        elif behaviour in by_behaviour:
            by_behaviour[behaviour].add(site.equation)
    scales = {var: names[entry] for var, entry in forms.heads.items()}
    zero_points, per_channel = _of_grids(scales, plan.tensors)
    return Binding(
        model,
        plan,
        tuple(bound),
        frozenset(by_behaviour[behaviours.PICK]),
        frozenset(by_behaviour[behaviours.DECIDE]),
        forms,
        entries,
        scales,
        zero_points,
        restorable(graph, [each.site for each in bound], mode.integer, inside),
        per_channel,
    )


def _is_kind(site: Site, planned: SitePlan) -> bool:
    """True for a site of the planned kind.

    `jax.vmap` of a convolution with its kernel makes a group of each sample, whose number tells
    what kind of convolution it is.
    """
    convolutions = {"conv2d", "depthwise_conv2d"}
    alike = planned.computes_weight and {site.kind, planned.kind} <= convolutions
    return alike or site.kind == planned.kind


def _as_planned(site: Site, planned: Mapping[str, SitePlan]) -> Site:
    """The site, its weight stored or computed as it is in the plan: one trace does not tell."""
    if site.name not in planned or site.weight is None:
        return site
    return dataclasses.replace(site, computes_weight=planned[site.name].computes_weight)


def _other_graph(names: Sequence[str] | set[str]) -> ValueError:
    return ValueError(
        "these inputs give another graph than the one that was quantized; "
        f"the sites {', '.join(sorted(set(names))[:5])} differ. A model that computes something "
        "else for this input shape or structure has to be quantized with such a sample"
    )
