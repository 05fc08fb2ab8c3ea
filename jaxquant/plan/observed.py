"""Which tensors calibration has to observe."""

from __future__ import annotations

import dataclasses

from jaxquant.calibration.observed import Observed
from jaxquant.graph import ir, kinds
from jaxquant.graph.checks import check_sites
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.plan.candidates import candidates, reason_for_float, reported
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.draft import forms_of, on_planned_grids, own_sites
from jaxquant.plan.evenness import tied_tensors
from jaxquant.plan.refused import check_patterns, nothing_left


@once
def observed_tensors(model: Model, config: QuantConfig) -> Observed:
    """The tensors that a quantization by `config` may need a threshold of.

    Those that become int8 without the skips are among them, and those that do when convolutions
    and dots alone are int8, so that these choices can be changed later.
    """
    # Errors of names come before hours of calibration.
    sites = reported(model.sites, config)
    check_sites(sites)
    check_patterns(model.sites, config)
    observed = _observed(model, config)
    if not observed.names:
        raise nothing_left(_reasons(model, config))
    return observed


def _reasons(model: Model, config: QuantConfig) -> set[str]:
    """Why the sites of a model stay float, those of its bodies too."""
    sites = reported(own_sites(model), config)
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
    graph, names, found = model.graph, model.names, own_sites(model)
    without_skips = dataclasses.replace(config, skip=(), skip_first_last=False, rules=())
    # By their own defaults: what would be int8 if convolutions and dots were all.
    weighted = QuantConfig(quantizable_op_type=kinds.WEIGHTED_KINDS)
    entries: dict[str, ir.Var] = {}
    tied: dict[str, ir.Var] = {}
    choices = {}
    # What is int8 with fewer sites is not always int8 with more (an epilogue may absorb it), so the
    # tensors of all three choices are observed.
    for choice in (weighted, without_skips, config):
        chosen = on_planned_grids(candidates(model, found, choice), choice)
        # Equal forms are looked at once.
        choices[forms_of(model, found, chosen, choice)] = chosen
    for forms, chosen in choices.items():
        entries |= {names[var]: var for var in forms.entries}
        tied |= tied_tensors(graph, chosen, forms, names)
    return entries | {name: var for name, var in tied.items() if name not in entries}
