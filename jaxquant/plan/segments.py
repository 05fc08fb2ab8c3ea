"""Rules for some layers of a scan: where it is cut, and what is set for the sites of each segment.

All layers of a scan share one program, so layers that are quantized unlike others (another type,
other bits or recovery steps) have a scan of their own; see `jaxquant.graph.cuts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.calibration.observations import Observations
from jaxquant.graph import kinds
from jaxquant.graph.batch_sizes import trace_with_batch_sizes
from jaxquant.graph.cuts import Cuts, scanned_operands
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import FloatModel, Model
from jaxquant.graph.patterns import matches_layer, takes_some_layers
from jaxquant.graph.sites import Site
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.rules import (
    SETTINGS,
    SHARED_SETTINGS,
    Rule,
    check_rules,
    check_skip,
    first_layer,
    matching,
)


def find_cuts(model: Model, sites: Sequence[Site], rules: Sequence[Rule]) -> Cuts:
    """Where the scans of a model are cut, so that rules set the same for all layers of a segment.

    Args:
      model: it.
      sites: its sites.
      rules: those of the user, `skip` too.

    Raises:
      ValueError: a rule sets for some layers of a scan what all of them share, and the scan cannot
        be cut.
    """
    graph = model.graph
    of_scans: dict[int, set[int]] = {}
    shared = [rule for rule in rules if any(getattr(rule, n) is not None for n in SHARED_SETTINGS)]
    for site in sites:
        some = [rule for rule in shared if takes_some_layers(site, rule.pattern)]
        for rule in some:
            _check_layers(model, site, rule)
        if some:
            layers = [_settings(site, number, shared) for number in range(site.scans[0])]
            # A segment ends where what is set for a site changes.
            changes = [n for n in range(1, len(layers)) if layers[n] != layers[n - 1]]
            of_scans.setdefault(site.location[0], set()).update((0, *changes, len(layers)))
    # Parameters that one scan goes over are cut alike, and so are the scans over one parameter.
    of_leaves: dict[int, set[int]] = {}
    while True:  # until nothing is added: a cut goes from scan to parameter to scan
        before = sum(map(len, of_scans.values()))
        for eqn in graph.equations:
            leaves = [var for var in scanned_operands(eqn) if var in graph.leaves]
            both = of_scans.get(eqn.index, set()).union(*(of_leaves.get(v, ()) for v in leaves))
            if both:
                of_scans[eqn.index] = both
                of_leaves |= dict.fromkeys(leaves, both)
        if sum(map(len, of_scans.values())) == before:
            return {graph.paths[var]: tuple(sorted(cut)) for var, cut in of_leaves.items()}


def _settings(site: Site, number: int, rules: Sequence[Rule]) -> list[tuple[Any, str] | None]:
    """What rules set that all layers of a scan share, in one layer of a site, and why."""
    # A rule of inner layers was refused, so that the first stands for them.
    layer = (number, *first_layer(site)[1:])
    places = matching(rules, site, layer)
    found: list[tuple[Any, str] | None] = []
    for name in SHARED_SETTINGS:
        setting = [rules[place] for place in places if getattr(rules[place], name) is not None]
        last = setting[-1] if setting else None
        found.append(None if last is None else (getattr(last, name), last.reason or last.pattern))
    return found


def why_not_cut(model: Model, site: Site) -> str:
    """Why the scan over stacked weights around a site cannot be cut; "" where it can be.

    Args:
      model: a whole model.
      site: one of its sites, inside such a scan.
    """
    eqn = model.graph.equations[site.location[0]]
    (body, *_) = model.bodies[eqn.index]
    if body.layers is None:
        return f"whose scan runs inside {eqn.name!r} and has one program for all its layers there"

    # A parameter can be cut as it is; what is computed from it is computed whole.
    if not any(var in model.graph.leaves for var in scanned_operands(eqn)):
        return (
            "whose weights are computed before the scan goes over them, so that it has one program "
            "for all its layers"
        )
    return ""


def _check_layers(model: Model, site: Site, rule: Rule) -> None:
    """Raise ValueError where a rule takes layers of a site for which the scan cannot be cut."""
    shared = " and ".join(name for name in SHARED_SETTINGS if getattr(rule, name) is not None)
    start = f"the pattern {rule.pattern!r} sets {shared} for some layers of {site.name!r}, "
    end = "algo and symmetric may be set for one layer"
    if why := why_not_cut(model, site):
        raise ValueError(f"{start}{why}. Set it for the whole site; {end}")
    # Any two layers of an inner scan run one program, whatever the outer layer.
    for number in range(site.scans[0]):
        inner = np.ndindex(site.scans[1:])
        if len({matches_layer(site, rule.pattern, (number, *layer)) for layer in inner}) > 1:
            raise ValueError(
                f"{start}a scan inside a scan, of which the inner one has one program for all its "
                f"layers. Set it for layers of the outer one, with one pair of brackets; {end}"
            )


def cut_scans(
    source: FloatModel,
    model: Model,
    config: QuantConfig,
    inputs: tuple[Any, ...],
    others: Sequence[tuple[Any, ...]] = (),
) -> Cut | None:
    """A model with its scans cut as the rules ask for; None where they ask for nothing.

    Args:
      source: the float model.
      model: it, traced.
      config: has the rules.
      inputs, others: what it was traced for, see `trace_with_batch_sizes`.

    Raises:
      ValueError: a pattern matches nothing, or a scan cannot be cut.
    """
    # Before the cut: patterns are of the model as the user has it.
    check_skip(model.sites, config.skip)
    check_rules(model.sites, config.rules, config.kinds)
    cuts = find_cuts(model, model.sites, config.all_rules)
    if not cuts:
        return None
    source = FloatModel(source.apply_fn, source.given, cuts)
    return Cut(source, trace_with_batch_sizes(source, inputs, others), model)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model with its scans cut, beside what it was before.

    Attributes:
      source: the float model, cut.
      model: it, traced.
      before: the traced model before.
    """

    source: FloatModel
    model: Model
    before: Model

    def resolved(self, config: QuantConfig) -> QuantConfig:
        """The configuration with rules that name the sites of the segments one by one."""
        known = {site.location: site for site in self.before.sites}
        rules: list[Rule] = []
        for rule in config.all_rules:
            for site in self.model.sites:
                # Sites outside of scans are where they were; those of a segment are at the scan's
                # old place.
                segment = self.model.origins[site.location[0]]
                was = known.get((segment.equation, *site.location[1:]))
                if was is not None:  # no operation that puts the segments together
                    rules += _for_site(rule, site, was, segment.start, config)
        # Skips are rules by now, resolved with the others.
        return dataclasses.replace(config, skip=(), rules=tuple(rules))

    def renamed(self, observations: Observations) -> Observations:
        """What was observed of the model before, by the names of the tensors of the segments."""
        names = dict(_names(self.model, self.before, (), ()))
        top = self.model.origins
        for index, bodies in self.model.bodies.items():
            # A segment's body is the old one's, its layers counted from the segment's first.
            for body, was in zip(bodies, self.before.bodies[top[index].equation], strict=True):
                names |= _names_inside(body, was, (), (), top[index].start)

        def chosen(found: Mapping[str, Any]) -> dict[str, Any]:
            return {new: found[old] for new, old in names.items() if old in found}

        return dataclasses.replace(
            observations,
            tensors=chosen(observations.tensors),
            states=chosen(observations.states),
        )


def _for_site(rule: Rule, site: Site, was: Site, start: int, config: QuantConfig) -> Iterator[Rule]:
    """A rule as it is for one site of a model that is cut.

    Args:
      rule: of the model before.
      site: the site.
      was: the same in the model before.
      start: the first of its layers there.
      config: tells which kinds may be int8.
    """

    def taken(layer: tuple[int, ...]) -> bool:
        # Layers are counted from the segment's first one.
        before = (layer[0] + start, *layer[1:]) if layer else ()
        return matches_layer(was, rule.pattern, before)

    # A pattern for a layer matches all of its sites; what one of them cannot have is left out.
    settings = {name: getattr(rule, name) for name in SETTINGS}
    if not site.stores_weight:
        settings |= {"recover": None, "weight_bits": None}
    if site.kind not in kinds.DOT_KINDS:
        settings["dynamic"] = None
    if settings["dtype"] == "int8" and site.kind not in config.kinds:
        settings["dtype"] = None
    if all(value is None for value in settings.values()):
        return
    reason = rule.reason or f"rule {rule.pattern!r}"
    # One rule for the site where all of its layers are meant, else one for each of them.
    layers = list(np.ndindex(site.scans))
    if all(map(taken, layers)):
        yield Rule(f"site:{site.name}", reason=reason, **settings)
        return
    for layer in filter(taken, layers):
        yield Rule(f"site:{site.name}{layer_suffix(layer)}", reason=reason, **settings)


def _names(
    model: Model, before: Model, layer: Sequence[int], was: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """The tensors of a graph in one layer: their names, and those that they had."""
    for var, name in model.names.items():
        if var in before.names:
            yield name + layer_suffix(layer), before.names[var] + layer_suffix(was)


def _names_inside(
    body: Model, before: Model, layer: tuple[int, ...], was: tuple[int, ...], start: int
) -> dict[str, str]:
    """The same of all layers of a body, and of those inside; `start` is its first layer before."""
    found: dict[str, str] = {}
    numbers = [()] if body.layers is None else [(n,) for n in range(body.layers)]
    for number in numbers:
        here, there = (*layer, *number), (*was, *(n + start for n in number))
        found |= _names(body, before, here, there)
        for index, bodies in body.bodies.items():
            for inner, inner_before in zip(bodies, before.bodies[index], strict=True):
                found |= _names_inside(inner, inner_before, here, there, 0)
    return found
