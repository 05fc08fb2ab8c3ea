"""What a configuration makes int8 in one graph, before it is a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxquant.calibration.observations import Observations
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan.bind import is_elsewhere
from jaxquant.plan.candidates import candidates, is_dynamic, reported
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.evenness import constants_in, find_uneven
from jaxquant.plan.form_search import find_forms
from jaxquant.plan.forms import Forms
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import LITERT, TensorPlan
from jaxquant.plan.rules import Rule
from jaxquant.plan.tensors import plan_tensors, tensor_settings


def own_sites(model: Model) -> tuple[Site, ...]:
    """The sites in a model's own part of the plan: those in no body with a part of its own."""
    return tuple(site for site in model.sites if not is_elsewhere(model, site))


class Seen(NamedTuple):
    """What calibration saw of a graph in one layer of the scans around it; None without it."""

    layer: tuple[int, ...]
    observations: Observations | None


class Draft(NamedTuple):
    """What a configuration makes int8: the sites, the forms of tensors, their grids.

    `static` are those of the sites that read tensors on grids of the plan.
    """

    config: QuantConfig
    chosen: tuple[Site, ...]
    static: tuple[Site, ...]
    forms: Forms
    tensors: tuple[TensorPlan, ...]


def make_draft(model: Model, found: tuple[Site, ...], seen: Seen, config: QuantConfig) -> Draft:
    graph = model.graph
    chosen = candidates(model, found, config)
    static = on_planned_grids(chosen, config) if MODES[config.mode].tensor_scales else ()
    forms = forms_of(model, found, static, config)
    # In modes without scales no tensor is int8, and none was observed.
    if seen.observations is None:
        return Draft(config, chosen, static, forms, ())
    constants = constants_in(graph, static, forms)
    settings = tensor_settings(static, forms, model.names, config, seen.layer)
    tensors = plan_tensors(forms, model.names, constants, seen.observations, settings, config)
    return Draft(config, chosen, static, forms, tensors)


def on_planned_grids(chosen: Sequence[Site], config: QuantConfig) -> tuple[Site, ...]:
    """The sites that read tensors on grids of the plan, of those that were chosen."""
    return tuple(site for site in chosen if not (site.is_lookup or is_dynamic(site, config)))


def forms_of(
    model: Model, found: tuple[Site, ...], chosen: Sequence[Site], config: QuantConfig
) -> Forms:
    """The int8 forms with these sites; the others of the report hand no int8 through."""
    allowed = {site.name for site in chosen}
    sites = reported(found, config)
    # An embedding that is left out hands no int8 through in any case.
    left = [site for site in sites if site.name not in allowed and not site.is_lookup]
    barred = {site.equation for site in left if not site.inside}
    return find_forms(model, chosen, config.kinds, barred, config.target == LITERT)


def with_even_parts(
    model: Model, found: tuple[Site, ...], seen: Seen, config: QuantConfig
) -> Draft:
    """What becomes int8 without the sites that would tie parts of too different a range.

    Each round leaves more sites in float, so there is a last one.
    """
    assert seen.observations is not None
    draft, tensors = make_draft(model, found, seen, config), seen.observations.tensors
    # With fewer forms other tensors share scales, so that all is judged again.
    while uneven := find_uneven(model, draft.static, draft.forms, tensors, draft.tensors):
        left = [Rule(f"site:{name}", dtype="float", reason=why) for name, why in uneven.items()]
        config = draft.config.with_rules(left)
        draft = make_draft(
            model, found, seen, _on_observed(model, found, seen.observations, config)
        )
    return draft


def _on_observed(
    model: Model, found: tuple[Site, ...], observations: Observations, config: QuantConfig
) -> QuantConfig:
    """Without the sites that read tensors in float that nobody observed.

    What is quantized from float where a site stays float was int8 already where it does not.
    """
    while True:
        static = on_planned_grids(candidates(model, found, config), config)
        entries = forms_of(model, found, static, config).entries
        unknown = {var for var in entries if model.names[var] not in observations.tensors}
        left = [site.name for site in static if unknown.intersection(site.operands)]
        if not left:
            return config
        reason = "it reads what another site would have left in int8, whose parts are too uneven"
        rules = [Rule(f"site:{name}", dtype="float", reason=reason) for name in left]
        config = config.with_rules(rules)
