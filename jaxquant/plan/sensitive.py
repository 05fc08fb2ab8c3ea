"""Sites that four bits cost most, kept in eight where that is next to free.

Small weights are those: a depthwise convolution sums nine products, whose errors do not average
out; every token reads the same rows of a small table (the positions of a transformer); keys and
values that heads share, a router of experts, the first layer of an image network.  On MiniLM-L6 the
positions alone cost more in 4 bits than the words, which are sixty times as many.  So the smallest
weights are kept, as many as hold a small part of the parameters together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.graph import kinds
from jaxquant.graph.layer_names import alike_layers
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.rules import Rule

PART = 1 / 20  # of the parameters may be kept in 8 bits


class _Unit(NamedTuple):
    """Weights that are kept together.

    Attributes:
      paths: of their parameters.
      size: how many numbers they hold.
      last: the number of the last site that reads one.
    """

    paths: frozenset[str]
    size: int
    last: int


def eight_bit_rules(model: Model, config: QuantConfig) -> tuple[Rule, ...]:
    """A rule for each sensitive site of a model whose weights are to be of 4 bits.

    The smallest weights, as long as all together hold at most `PART` of the parameters, and of
    those that are as small the last.  Sites that read one tensor (queries, keys and values), one
    parameter (tied embeddings) or are alike (a Python loop's layers, as a scan's) are decided on
    together.

    Args:
      model: the traced model.
      config: what was asked for.
    """
    if config.weight_bits != 4:
        return ()
    graph = model.graph
    sizes = {graph.paths[var]: math.prod(graph.shape(var)) for var in graph.leaves}
    sites = [each for each in _weighted(model) if each[1].weight_path in sizes]
    # From the smallest on, as many as fit into the given part of the model's size.
    left, kept = PART * sum(sizes.values()), set[str]()
    for unit in sorted(_units(sites, sizes), key=lambda unit: (unit.size, -unit.last)):
        left -= unit.size
        if left < 0:
            break
        kept |= unit.paths
    reason = "one of the smallest weights: sensitive, and next to free"
    return tuple(
        Rule(f"site:{site.name}", weight_bits=8, reason=reason)
        for _, site in sites
        if site.weight_path in kept
    )


def _weighted(model: Model) -> Iterator[tuple[Model, Site]]:
    """The sites with a stored weight, those in bodies too, each with the graph that it is in."""
    weighted = (*kinds.WEIGHTED_KINDS, kinds.LOOKUP_KIND)
    for site in model.sites:
        if not site.inside and site.kind in weighted and site.stores_weight:
            yield model, site
    for body in (body for bodies in model.bodies.values() for body in bodies):
        yield from _weighted(body)


def _units(sites: Sequence[tuple[Model, Site]], sizes: Mapping[str, int]) -> list[_Unit]:
    """Weights by what their sites have in common: what they read, or their parameter."""
    units: list[tuple[set[Any], _Unit]] = []
    layers = alike_layers(site.name for _, site in sites)
    for number, (model, site) in enumerate(sites):
        # Products of one tensor are one call, where their weights are of one kind.
        reads = {(model, var) for var in site.operands}
        marks = {site.weight_path, (layers[site.name], sizes[site.weight_path]), *reads}
        unit = _Unit(frozenset({site.weight_path}), sizes[site.weight_path], number)
        for its_marks, other in [each for each in units if each[0] & marks]:
            paths = unit.paths | other.paths
            unit = _Unit(paths, sum(sizes[path] for path in paths), number)
            marks |= its_marks
            units.remove((its_marks, other))
        units.append((marks, unit))
    return [unit for _, unit in units]
