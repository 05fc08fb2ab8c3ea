"""Make a plan from a graph, observations and a configuration."""

from __future__ import annotations

from collections.abc import Sequence

from jaxquant.calibration.observations import Observations
from jaxquant.graph.checks import check_sites
from jaxquant.graph.model import Model
from jaxquant.graph.regions import Region
from jaxquant.graph.sites import Site
from jaxquant.plan.bind import bind, layers_of
from jaxquant.plan.binding import Binding
from jaxquant.plan.candidates import candidates, reported
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.draft import Draft, Seen, forms_of, make_draft, own_sites, with_even_parts
from jaxquant.plan.plan import INT8, Plan, PlannedCut, SitePlan, TensorPlan
from jaxquant.plan.refused import check_patterns, nothing_left
from jaxquant.plan.rules import Rule
from jaxquant.plan.site_plans import site_plans
from jaxquant.plan.ties import without_ties


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
    check_patterns(found, config)
    sites, tensors = _plan_region(model, observations, config, [()])
    # Bodies are planned behind the graph that holds them; the report goes by evaluation order.
    places = {site.name: site.location for site in found}
    sites.sort(key=lambda plan: places[plan.name])
    if not any(plan.status == INT8 for plan in sites):
        raise nothing_left({f"{plan.kind}: {plan.reason}" for plan in sites})
    plan = Plan(
        sites=tuple(sites),
        tensors=tuple(tensors),
        kinds=tuple(sorted(config.kinds)),
        weight_quantize_type=config.weight_quantize_type,
        algo=config.algo_name,
        mode=config.mode,
        group_size=config.group_size,
        # Cuts belong to the plan: without them another trace has other sites.
        cuts=tuple(PlannedCut(path, bounds) for path, bounds in sorted(model.cuts.items())),
        target=config.target,
    )

    # A plan is bound before its scales are final: ties are found in the graph.
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
    found = own_sites(model)
    stats = [None] * len(layers) if observations is None else observations.of_layers(layers)
    seen = [Seen(layer, own) for layer, own in zip(layers, stats, strict=True)]
    # A rule that the data of one layer asks for (too uneven, never seen) holds for all layers,
    # which may in turn leave others without a reader; each round adds rules, so it ends.
    while True:
        drafts = [_drafted(model, found, each, config) for each in seen]
        rules = {rule: None for draft in drafts for rule in draft.config.rules}
        # Rules are compared whole, so that two layers with one complaint make one rule.
        new = [rule for rule in rules if rule not in config.rules]
        config = config.with_rules(new)
        if all(draft.config.rules == config.rules for draft in drafts):
            break
    # What is int8 is the same in all layers by now, so one draft tells of the sites.
    sites = site_plans(model, found, drafts[0])
    tensors: list[TensorPlan] = []
    for layer, draft in zip(layers, drafts, strict=True):
        tensors += [tensor.in_layer(layer) for tensor in draft.tensors]
    for body in (body for bodies in model.bodies.values() for body in bodies):
        inner_sites, inner_tensors = _plan_region(body, observations, config, layers)
        sites += inner_sites
        tensors += inner_tensors
    return sites, tensors


def _drafted(model: Model, found: tuple[Site, ...], seen: Seen, config: QuantConfig) -> Draft:
    # Without calibration nothing is uneven.
    if seen.observations is None:
        return make_draft(model, found, seen, config)
    unseen = _unseen(model, found, seen.observations, config)
    rules = [Rule(f"site:{name}", dtype="float", reason=why) for name, why in unseen.items()]
    return with_even_parts(model, found, seen, config.with_rules(rules))


def _unseen(
    model: Model, found: tuple[Site, ...], observations: Observations, config: QuantConfig
) -> dict[str, str]:
    """The sites whose inputs no calibration batch gave a value, and why."""
    forms = forms_of(model, found, candidates(model, found, config), config)
    stats = [observations.tensors.get(model.names[var]) for var in forms.entries]
    seen = {
        forms.family[var]
        for var, each in zip(forms.entries, stats, strict=True)
        # Without statistics a tensor is missing, which is told later as an error; it is not empty.
        if each is None or each.count
    }
    # Where nothing at all was seen, the body never ran, which is worth saying as such.
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
