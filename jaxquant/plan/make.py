"""Make a plan from a graph, observations and a configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.calibration.observations import Observations
from jaxquant.calibration.observed import Observed
from jaxquant.graph import ir, kinds
from jaxquant.graph.checks import check_sites
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.regions import Region
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.bind import bind, is_elsewhere, layers_of
from jaxquant.plan.binding import Binding
from jaxquant.plan.candidates import (
    candidates,
    has_asymmetric_rows,
    is_dynamic,
    reason_for_float,
    reported,
)
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.epilogue import find_epilogue, fingerprint
from jaxquant.plan.evenness import constants_in, find_uneven, tied_tensors
from jaxquant.plan.forms import Forms, find_forms
from jaxquant.plan.modes import DYNAMIC, MODES, Mode
from jaxquant.plan.plan import INT8, LITERT, Plan, PlannedCut, SitePlan, TensorPlan
from jaxquant.plan.rules import (
    Rule,
    check_rules,
    check_skip,
    first_layer,
    matching,
    setting,
)
from jaxquant.plan.tensors import plan_tensors, tensor_settings
from jaxquant.plan.ties import without_ties


@once
def observed_tensors(model: Model, config: QuantConfig) -> Observed:
    """The tensors that a quantization by `config` may need a threshold of.

    Those that become int8 without the skips are among them, and those that do when convolutions
    and dots alone are int8, so that these choices can be changed later.
    """
    sites = reported(model.sites, config)
    check_sites(sites)
    _check_patterns(model.sites, config)
    observed = _observed(model, config)
    if not observed.names:
        raise _nothing_left(_reasons(model, config))
    return observed


def _reasons(model: Model, config: QuantConfig) -> set[str]:
    """Why the sites of a model stay float, those of its bodies too."""
    sites = reported(_own_sites(model), config)
    found = {f"{site.kind}: {reason_for_float(model, site, config)}" for site in sites}
    bodies = (body for bodies in model.bodies.values() for body in bodies)
    return found.union(*(_reasons(body, config) for body in bodies))


def _observed(model: Model, config: QuantConfig) -> Observed:
    bodies = {
        index: tuple(_observed(body, config) for body in bodies)
        for index, bodies in model.bodies.items()
    }
    return Observed(model, _observed_in_graph(model, config), bodies)


def _observed_in_graph(model: Model, config: QuantConfig) -> dict[str, ir.Var]:
    """Tensor name -> tensor, of those in a model's own graph."""
    graph, names, found = model.graph, model.names, _own_sites(model)
    without_skips = dataclasses.replace(config, skip=(), skip_first_last=False, rules=())
    weighted = QuantConfig(quantizable_op_type=kinds.WEIGHTED_KINDS)
    entries: dict[str, ir.Var] = {}
    tied: dict[str, ir.Var] = {}
    choices = {}
    for choice in (weighted, without_skips, config):
        chosen = _static(candidates(model, found, choice), choice)
        choices[_forms(model, found, chosen, choice)] = chosen
    for forms, chosen in choices.items():
        entries |= {names[var]: var for var in forms.entries}
        tied |= tied_tensors(graph, chosen, forms, names)
    return entries | {name: var for name, var in tied.items() if name not in entries}


def _own_sites(model: Model) -> tuple[Site, ...]:
    """The sites in a model's own part of the plan: those in no body with a part of its own."""
    return tuple(site for site in model.sites if not is_elsewhere(model, site))


def make_plan(model: Model, observations: Observations | None, config: QuantConfig) -> Binding:
    """Decide for every site of the model whether it becomes int8, and choose the scales.

    Args:
      model: the traced model.
      observations: of the tensors that get a scale; None in a mode without such tensors.
      config: the choices.

    Returns:
      The plan, bound to the model.

    Raises:
      ValueError: a skip pattern matches nothing, the model has no site, none is left, or the
        observations lack a tensor.
    """
    found = model.sites
    check_sites(reported(found, config))
    _check_patterns(found, config)
    sites, tensors = _plan_region(model, observations, config, [()])
    places = {site.name: site.location for site in found}
    sites.sort(key=lambda plan: places[plan.name])
    if not any(plan.status == INT8 for plan in sites):
        raise _nothing_left({f"{plan.kind}: {plan.reason}" for plan in sites})
    plan = Plan(
        sites=tuple(sites),
        tensors=tuple(tensors),
        kinds=tuple(sorted(config.kinds)),
        weight_quantize_type=config.weight_quantize_type,
        algo=config.algo_name,
        mode=config.mode,
        group_size=config.group_size,
        cuts=tuple(PlannedCut(path, bounds) for path, bounds in sorted(model.cuts.items())),
        target=config.target,
    )
    return without_ties(bind(model, plan))


def _plan_region(
    model: Model,
    observations: Observations | None,
    config: QuantConfig,
    around: Sequence[tuple[int, ...]],
) -> tuple[list[SitePlan], list[TensorPlan]]:
    """The plan of a model, with its bodies, for all layers of the scans around it.

    What becomes int8 is the same in all layers, for which there is one program: what one layer
    cannot have is float in all of them.
    """
    layers = [layer for outer in around for layer in layers_of(model, outer)]
    found = _own_sites(model)
    stats = [None] * len(layers) if observations is None else observations.of_layers(layers)
    seen = [_Seen(layer, own) for layer, own in zip(layers, stats, strict=True)]
    while True:
        drafts = [_drafted(model, found, each, config) for each in seen]
        rules = {rule: None for draft in drafts for rule in draft.config.rules}
        new = [rule for rule in rules if rule not in config.rules]
        config = config.with_rules(new)
        if all(draft.config.rules == config.rules for draft in drafts):
            break
    sites = _site_plans(model, found, drafts[0])
    tensors: list[TensorPlan] = []
    for layer, draft in zip(layers, drafts, strict=True):
        tensors += [tensor.in_layer(layer) for tensor in draft.tensors]
    for body in (body for bodies in model.bodies.values() for body in bodies):
        inner_sites, inner_tensors = _plan_region(body, observations, config, layers)
        sites += inner_sites
        tensors += inner_tensors
    return sites, tensors


class _Seen(NamedTuple):
    """What calibration saw of a graph in one layer of the scans around it; None without it."""

    layer: tuple[int, ...]
    observations: Observations | None


def _drafted(model: Model, found: tuple[Site, ...], seen: _Seen, config: QuantConfig) -> _Draft:
    if seen.observations is None:
        return _draft(model, found, seen, config)
    unseen = _unseen(model, found, seen.observations, config)
    rules = [Rule(f"site:{name}", dtype="float", reason=why) for name, why in unseen.items()]
    return _with_even_parts(model, found, seen, config.with_rules(rules))


def _unseen(
    model: Model, found: tuple[Site, ...], observations: Observations, config: QuantConfig
) -> dict[str, str]:
    """The sites whose inputs no calibration batch gave a value, and why."""
    forms = _forms(model, found, candidates(model, found, config), config)
    stats = [observations.tensors.get(model.names[var]) for var in forms.entries]
    seen = {
        forms.family[var]
        for var, each in zip(forms.entries, stats, strict=True)
        if each is None or each.count
    }
    if model.body is not None and forms.entries and not seen:
        return {site.name: _why_unseen(model.body) for site in found}
    families = {site.name: {forms.family.get(var) for var in site.operands} for site in found}
    return {
        name: "its input was empty in every calibration batch"
        for name, read in families.items()
        if read - {None} - seen
    }


def _why_unseen(body: Region) -> str:
    """Why no calibration batch ran the body of a loop or choice."""
    if body.equation is not None and body.equation.name == "cond":
        return "no calibration batch chose its branch"
    return "no calibration batch ran a step of its loop"


def _site_plans(model: Model, found: tuple[Site, ...], draft: _Draft) -> list[SitePlan]:
    """The plans of the sites in a model's own graph."""
    graph, names, mode = model.graph, model.names, MODES[draft.config.mode]
    config, chosen, forms = draft.config, draft.chosen, draft.forms
    sites = reported(found, config)
    families = {var: names[entry] for var, entry in forms.heads.items()}
    allowed = {site.name for site in chosen}
    absorbed = _absorbed(graph, chosen)
    plans = []
    for site in sites:
        if site.location in absorbed:
            continue
        if site.name in allowed:
            reason = _unused(graph, site, forms)
        else:
            reason = reason_for_float(model, site, config)
        plan_of_site = _site_plan(graph, site, reason, mode, families)
        plans.append(plan_of_site if reason else _with_settings(graph, plan_of_site, site, config))
    return plans


def _check_patterns(found: tuple[Site, ...], config: QuantConfig) -> None:
    check_skip(found, config.skip)
    check_rules(found, config.rules, config.kinds)


class _Draft(NamedTuple):
    """What a configuration makes int8: the sites, the forms of tensors, their grids.

    `static` are those of the sites that read tensors on grids of the plan.
    """

    config: QuantConfig
    chosen: tuple[Site, ...]
    static: tuple[Site, ...]
    forms: Forms
    tensors: tuple[TensorPlan, ...]


def _draft(model: Model, found: tuple[Site, ...], seen: _Seen, config: QuantConfig) -> _Draft:
    graph = model.graph
    chosen = candidates(model, found, config)
    static = _static(chosen, config) if MODES[config.mode].tensor_scales else ()
    forms = _forms(model, found, static, config)
    if seen.observations is None:
        return _Draft(config, chosen, static, forms, ())
    constants = constants_in(graph, static, forms)
    settings = tensor_settings(static, forms, model.names, config, seen.layer)
    tensors = plan_tensors(forms, model.names, constants, seen.observations, settings, config)
    return _Draft(config, chosen, static, forms, tensors)


def _static(chosen: Sequence[Site], config: QuantConfig) -> tuple[Site, ...]:
    """Those of the sites that read tensors on grids of the plan."""
    return tuple(site for site in chosen if not (site.is_lookup or is_dynamic(site, config)))


def _with_even_parts(
    model: Model, found: tuple[Site, ...], seen: _Seen, config: QuantConfig
) -> _Draft:
    """What becomes int8 without the sites that would tie parts of too different a range.

    Each round leaves more sites in float, so there is a last one.
    """
    assert seen.observations is not None
    draft, tensors = _draft(model, found, seen, config), seen.observations.tensors
    while uneven := find_uneven(model, draft.static, draft.forms, tensors, draft.tensors):
        left = [Rule(f"site:{name}", dtype="float", reason=why) for name, why in uneven.items()]
        config = draft.config.with_rules(left)
        draft = _draft(model, found, seen, config)
    return draft


def _forms(
    model: Model, found: tuple[Site, ...], chosen: Sequence[Site], config: QuantConfig
) -> Forms:
    """The int8 forms with these sites; the others of the report hand no int8 through."""
    allowed = {site.name for site in chosen}
    sites = reported(found, config)
    left = [site for site in sites if site.name not in allowed and not site.is_lookup]
    barred = {site.equation for site in left if not site.inside}
    return find_forms(model, chosen, config.kinds, barred, config.target == LITERT)


def _nothing_left(reasons: set[str]) -> ValueError:
    first = sorted(reasons)[:5]
    others = f"; and {len(reasons) - len(first)} more" if len(reasons) > len(first) else ""
    return ValueError(f"no site is left to quantize ({'; '.join(first)}{others})")


def _with_settings(graph: ir.Graph, plan: SitePlan, site: Site, config: QuantConfig) -> SitePlan:
    """The plan of an int8 site with what the rules set for it."""
    rules = config.all_rules
    places = matching(rules, site, first_layer(site))
    settings: dict[str, Any] = {
        name: setting(rules, places, name, getattr(config, name))
        for name in ("recover", "weight_bits")
    }
    if site.is_lookup:  # it has no sums that could be off
        settings["recover"] = ()
    if settings["weight_bits"] == 4:
        settings["weight_dtype"] = config.weight_dtype
    if is_dynamic(site, config):
        settings |= {"dynamic": True, "inputs": ()}
    if is_dynamic(site, config) or config.mode == DYNAMIC:
        settings["asymmetric"] = has_asymmetric_rows(graph, site, config)
    return dataclasses.replace(plan, **settings)


def _absorbed(graph: ir.Graph, chosen: Sequence[Site]) -> set[tuple[int, ...]]:
    """The locations of the shape operations that epilogues absorb."""
    return {
        (eqn.index,)
        for site in chosen
        if behaviours.behaviour_of(site.kind, graph.equations[site.equation])
        == behaviours.ACCUMULATE
        for eqn in find_epilogue(graph, site).movements
    }


def _unused(graph: ir.Graph, site: Site, forms: Forms) -> str:
    eqn = graph.equations[site.equation]
    if site.inside or eqn.index in forms.moves:
        return ""
    if behaviours.behaviour_of(site.kind, eqn) == behaviours.LAYOUT:
        return "between float operations"
    return "no int8 site reads it" if kinds.is_join(eqn) else ""


def _site_plan(
    graph: ir.Graph,
    site: Site,
    reason: str,
    mode: Mode,
    families: Mapping[ir.Var, str],
) -> SitePlan:
    inputs: tuple[str, ...] = ()
    affine: tuple[str, ...] = ()
    activation: tuple[str, ...] = ()
    digest = ""
    if not reason:
        inputs = tuple(dict.fromkeys(families[v] for v in site.operands if v in families))
        eqn = graph.equations[site.equation]
        if behaviours.behaviour_of(site.kind, eqn) in (behaviours.ACCUMULATE, behaviours.LOOK_UP):
            epilogue = find_epilogue(graph, site, None if mode.integer else 0)
            affine, activation = epilogue.affine, epilogue.activation
            digest = fingerprint(graph, site, epilogue)
    return SitePlan(
        name=site.name,
        kind=site.kind,
        scope=site.scope,
        weight_path=site.weight_path,
        reason=reason,
        inputs=inputs,
        affine=affine,
        activation=activation,
        fingerprint=digest,
        computes_weight=site.computes_weight,
    )
