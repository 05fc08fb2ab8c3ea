"""Make a plan from a graph, observations and a configuration; find a plan in a graph again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jaxquant.calibration.algorithms import find_thresholds
from jaxquant.calibration.observations import Observations
from jaxquant.config import QuantConfig
from jaxquant.graph import ir, kinds
from jaxquant.graph.sites import Site, find_sites, tensor_names
from jaxquant.plan import select
from jaxquant.plan.epilogue import Epilogue, find_epilogue
from jaxquant.plan.forms import Forms, find_forms
from jaxquant.plan.plan import FLOAT, INT8, Plan, SitePlan, TensorPlan, scale_of


@dataclasses.dataclass(frozen=True)
class Int8Site:
    """An int8 site that accumulates in int32: what `quantize` and `run` work from."""

    site: Site
    epilogue: Epilogue


@dataclasses.dataclass(frozen=True)
class Binding:
    """A plan in a graph.

    Attributes:
      sites: the accumulating int8 sites.
      selects: the indices of the equations of int8 sites that select values.
      decisions: the indices of the equations of int8 sites that decide (argmax, comparisons).
      forms: which tensors are int8.
      names: entry tensor -> its name in the plan and in `qparams["tensors"]`.
      scales: int8 tensor -> the name of the entry that holds its scale.
    """

    sites: tuple[Int8Site, ...]
    selects: frozenset[int]
    decisions: frozenset[int]
    forms: Forms
    names: Mapping[ir.Var, str]
    scales: Mapping[ir.Var, str]


def observed_tensors(graph: ir.Graph, config: QuantConfig) -> dict[str, ir.Var]:
    """Tensor name -> tensor, for all that a quantization by `config` may need a threshold of.

    Those that become int8 without the skips are among them, and the inputs of every convolution
    and dot with a weight, so that these choices can be changed later.
    """
    found = find_sites(graph)
    sites = select.reported(graph, found, config)
    names = tensor_names(graph, found)
    every_kind = (*config.quantizable_op_type, *kinds.WEIGHTED_KINDS)
    without_skips = dataclasses.replace(
        config, quantizable_op_type=every_kind, skip=(), skip_first_last=False
    )
    entries: dict[str, ir.Var] = {}
    for choice in (without_skips, config):
        forms = find_forms(graph, select.candidates(graph, found, choice))
        entries |= {names[var]: var for var in forms.entries}
    if not entries:
        raise _nothing_left(
            {f"{s.kind}: {select.reason_for_float(graph, s, found, config)}" for s in sites}
        )
    return entries


def make_plan(graph: ir.Graph, observations: Observations, config: QuantConfig) -> Plan:
    """Decide for every site of the graph whether it becomes int8, and choose the scales.

    Raises:
      ValueError: a skip pattern matches nothing, the model has no site, none is left, or the
        observations lack a tensor.
    """
    found = find_sites(graph)
    sites = select.reported(graph, found, config)
    select.check_skip(found, config.skip)
    chosen = select.candidates(graph, found, config)
    forms = find_forms(graph, chosen)
    names = tensor_names(graph, found)
    tensors = _plan_tensors(forms, names, observations, config.algo)
    groups = {var: names[entry] for var, entry in _group_entries(forms).items()}
    allowed = {site.name for site in chosen}
    absorbed = _absorbed(graph, chosen)
    plans = []
    for site in sites:
        if site.location in absorbed:
            continue
        if site.name in allowed:
            reason = _unused(graph, site, forms)
        else:
            reason = select.reason_for_float(graph, site, found, config)
        plans.append(_site_plan(graph, site, reason, forms, groups))
    if not any(plan.status == INT8 for plan in plans):
        raise _nothing_left({f"{plan.kind}: {plan.reason}" for plan in plans})
    return Plan(tuple(plans), tensors, config.weight_quantize_type, config.algo)


def bind(graph: ir.Graph, plan: Plan) -> Binding:
    """Find the plan's sites and tensors in a graph, which may be traced for another input shape.

    Raises:
      ValueError: the graph has other sites or int8 tensors than the plan.
    """
    found = find_sites(graph)
    planned = {site.name: site for site in plan.sites}
    here = {site.name: site for site in found}
    differing = [n for n, p in planned.items() if n not in here or here[n].kind != p.kind]
    dots = select.reported(graph, found, QuantConfig())
    differing += [site.name for site in dots if site.name not in planned]
    if differing:
        raise _other_graph(differing)
    chosen = [s for s in found if s.name in planned and planned[s.name].status == INT8]
    forms = find_forms(graph, chosen)
    names = tensor_names(graph, found)
    entries = {var: names[var] for var in forms.entries}
    if set(entries.values()) != {tensor.name for tensor in plan.tensors}:
        raise _other_graph(set(entries.values()) ^ {tensor.name for tensor in plan.tensors})
    bound, by_behaviour = [], {kinds.SELECT: set[int](), kinds.DECIDE: set[int]()}
    for site in chosen:
        behaviour = kinds.behaviour(site.kind, graph.equations[site.equation])
        if behaviour == kinds.ACCUMULATE:
            affine = planned[site.name].affine
            epilogue = find_epilogue(graph, site, steps_at_most=len(affine))
            if epilogue.affine != affine:
                raise _other_graph([site.name])
            bound.append(Int8Site(site, epilogue))
        elif behaviour in by_behaviour:
            by_behaviour[behaviour].add(site.equation)
    scales = {var: names[entry] for var, entry in _group_entries(forms).items()}
    return Binding(
        tuple(bound),
        frozenset(by_behaviour[kinds.SELECT]),
        frozenset(by_behaviour[kinds.DECIDE]),
        forms,
        entries,
        scales,
    )


def _nothing_left(reasons: set[str]) -> ValueError:
    return ValueError(f"no site is left to quantize ({'; '.join(sorted(reasons))})")


def _other_graph(names: Sequence[str] | set[str]) -> ValueError:
    return ValueError(
        "these inputs give another graph than the one that was quantized; "
        f"the sites {', '.join(sorted(set(names))[:5])} differ. A model that computes something "
        "else for this input shape or structure has to be quantized with such a sample"
    )


def _group_entries(forms: Forms) -> dict[ir.Var, ir.Var]:
    """Every int8 tensor -> the first entry of its scale group."""
    first: dict[ir.Var, ir.Var] = {}
    for entry in forms.entries:
        first.setdefault(forms.group[entry], entry)
    return {var: first[group] for var, group in forms.group.items()}


def _plan_tensors(
    forms: Forms, names: Mapping[ir.Var, str], observations: Observations, algo: str
) -> tuple[TensorPlan, ...]:
    missing = [names[var] for var in forms.entries if names[var] not in observations.tensors]
    if missing:
        raise ValueError(
            f"the observations hold nothing on {', '.join(map(repr, missing[:5]))}; calibrate with "
            "the same apply_fn and the same quantizable_op_type, is_full_quantize and skip"
        )
    groups: dict[str, list[str]] = {}
    heads = _group_entries(forms)
    for var in forms.entries:
        groups.setdefault(names[heads[var]], []).append(names[var])
    thresholds = find_thresholds(observations, algo, groups)
    return tuple(
        TensorPlan(name, group, thresholds[group], scale_of(thresholds[group]))
        for group, members in groups.items()
        for name in members
    )


def _absorbed(graph: ir.Graph, chosen: Sequence[Site]) -> set[tuple[int, ...]]:
    """The locations of the shape operations that epilogues absorb."""
    return {
        (eqn.index,)
        for site in chosen
        if kinds.behaviour(site.kind, graph.equations[site.equation]) == kinds.ACCUMULATE
        for eqn in find_epilogue(graph, site).movements
    }


def _unused(graph: ir.Graph, site: Site, forms: Forms) -> str:
    eqn = graph.equations[site.equation]
    if kinds.behaviour(site.kind, eqn) == kinds.LAYOUT and eqn.index not in forms.moves:
        return "between float operations"
    return ""


def _site_plan(
    graph: ir.Graph, site: Site, reason: str, forms: Forms, groups: Mapping[ir.Var, str]
) -> SitePlan:
    inputs: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()
    if not reason:
        inputs = tuple(dict.fromkeys(groups[v] for v in site.operands if v in groups))
        eqn = graph.equations[site.equation]
        if kinds.behaviour(site.kind, eqn) == kinds.ACCUMULATE:
            epilogue = find_epilogue(graph, site)
            affine, activation = epilogue.affine, epilogue.activation
    return SitePlan(
        name=site.name,
        kind=site.kind,
        scope=site.scope,
        weight_path=site.weight_path,
        status=FLOAT if reason else INT8,
        reason=reason,
        inputs=inputs,
        affine=affine,
        activation=activation,
    )
