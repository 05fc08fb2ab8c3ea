"""Find a plan in a graph again, which may be traced for another input shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxquant.graph import ir, kinds
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.epilogue import Epilogue, find_epilogue, fingerprint
from jaxquant.plan.forms import Forms, find_forms
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import INT8, Plan, SitePlan, TensorPlan
from jaxquant.plan.restore import Restored, restorable


@dataclasses.dataclass(frozen=True)
class Int8Site:
    """A quantized site with an accumulator or a weight: what `quantize` and `run` work from."""

    site: Site
    epilogue: Epilogue


@dataclasses.dataclass(frozen=True)
class Binding:
    """A plan in a model.

    Attributes:
      model, plan: what was bound.
      sites: the quantized sites that accumulate or that have a weight.
      selects: the indices of the equations of int8 sites that select values.
      decisions: the indices of the equations of int8 sites that decide (argmax, comparisons).
      forms: which tensors are int8.
      names: entry tensor -> its name in the plan and in `qparams["tensors"]`.
      scales: int8 tensor -> the name of the entry that holds its scale.
      zero_points: int8 tensor -> the int8 that stands for zero.
      restorable: the static tensors that follow from a stored weight.
      per_channel: the int8 tensors whose scale varies along channels: they are divided by channel.
    """

    model: Model
    plan: Plan
    sites: tuple[Int8Site, ...]
    selects: frozenset[int]
    decisions: frozenset[int]
    forms: Forms
    names: Mapping[ir.Var, str]
    scales: Mapping[ir.Var, str]
    zero_points: Mapping[ir.Var, int]
    restorable: Mapping[ir.Var, Restored]
    per_channel: frozenset[ir.Var]

    @property
    def graph(self) -> ir.Graph:
        return self.model.graph

    def with_tensors(self, tensors: Sequence[TensorPlan]) -> Binding:
        """The same tensors on other grids."""
        zero_points, per_channel = _of_grids(self.scales, tensors)
        return dataclasses.replace(
            self,
            plan=dataclasses.replace(self.plan, tensors=tuple(tensors)),
            zero_points=zero_points,
            per_channel=per_channel,
        )


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
    graph, mode = model.graph, MODES[plan.mode]
    planned = {site.name: site for site in plan.sites}
    found = [_as_planned(site, planned) for site in model.sites_of(mode.lookups)]
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
    forms = find_forms(model, chosen if mode.tensor_scales else (), plan.kinds, barred)
    names = model.names
    entries = {var: names[var] for var in forms.entries}
    if set(entries.values()) != {tensor.name for tensor in plan.tensors}:
        raise _other_graph(set(entries.values()) ^ {tensor.name for tensor in plan.tensors})
    bound, by_behaviour = [], {behaviours.SELECT: set[int](), behaviours.DECIDE: set[int]()}
    for site in chosen:
        behaviour = behaviours.behaviour_of(site.kind, graph.equations[site.equation])
        if behaviour in (behaviours.ACCUMULATE, behaviours.LOOK_UP):
            affine = planned[site.name].affine
            epilogue = find_epilogue(graph, site, steps_at_most=len(affine))
            known = fingerprint(graph, site, epilogue) == planned[site.name].fingerprint
            if epilogue.affine != affine or not known:
                raise _other_graph([site.name])
            bound.append(Int8Site(site, epilogue))
        elif behaviour in by_behaviour:
            by_behaviour[behaviour].add(site.equation)
    scales = {var: names[entry] for var, entry in group_entries(forms).items()}
    zero_points, per_channel = _of_grids(scales, plan.tensors)
    return Binding(
        model,
        plan,
        tuple(bound),
        frozenset(by_behaviour[behaviours.SELECT]),
        frozenset(by_behaviour[behaviours.DECIDE]),
        forms,
        entries,
        scales,
        zero_points,
        restorable(graph, [each.site for each in bound], mode.integer),
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


def group_entries(forms: Forms) -> dict[ir.Var, ir.Var]:
    """Every int8 tensor -> the first entry of its scale group."""
    first: dict[ir.Var, ir.Var] = {}
    for entry in forms.entries:
        first.setdefault(forms.group[entry], entry)
    return {var: first[group] for var, group in forms.group.items()}
