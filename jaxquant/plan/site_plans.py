"""What the plan says of each site of one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.graph import ir, kinds
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.candidates import has_asymmetric_rows, is_dynamic, reason_for_float, reported
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.draft import Draft
from jaxquant.plan.epilogue import find_epilogue, fingerprint
from jaxquant.plan.forms import Forms
from jaxquant.plan.modes import DYNAMIC, MODES, Mode
from jaxquant.plan.plan import SitePlan
from jaxquant.plan.rules import first_layer, matching, setting


def site_plans(model: Model, found: tuple[Site, ...], draft: Draft) -> list[SitePlan]:
    """The plans of the sites in a model's own graph."""
    graph, names, mode = model.graph, model.names, MODES[draft.config.mode]
    config, chosen, forms = draft.config, draft.chosen, draft.forms
    sites = reported(found, config)
    families = {var: names[entry] for var, entry in forms.heads.items()}
    allowed = {site.name for site in chosen}
    absorbed = _absorbed(graph, chosen)
    plans = []
    for site in sites:
        # A reshape or transpose inside an epilogue moves an accumulator: no tensor of its own.
        if site.location in absorbed:
            continue
        if site.name in allowed:
            reason = _unused(graph, site, forms)
        else:
            # Asked in the order of reasons: the first that holds is told.
            reason = reason_for_float(model, site, config)
        plan_of_site = _site_plan(graph, site, reason, mode, families)
        plans.append(plan_of_site if reason else _with_settings(graph, plan_of_site, site, config))
    return plans


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
    # Its rows have scales of their own in each call, so no tensor of the plan is read.
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
        # Two operands of one family (x @ x.T) are one input.
        inputs = tuple(dict.fromkeys(families[v] for v in site.operands if v in families))
        eqn = graph.equations[site.equation]
        if behaviours.behaviour_of(site.kind, eqn) in (behaviours.ACCUMULATE, behaviours.LOOK_UP):
            # Without integers nothing is absorbed: the site gives what it gave.
            epilogue = find_epilogue(graph, site, None if mode.integer else 0)
            affine, activation = epilogue.affine, epilogue.activation
            # It tells later whether another trace has the same site with the same epilogue.
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
