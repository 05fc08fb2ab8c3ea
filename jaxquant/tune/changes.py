"""What differs between two plans of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from jaxquant.plan import ties
from jaxquant.plan.plan import Plan, TensorPlan


def families_of(plan: Plan, sites: Sequence[str]) -> tuple[str, ...]:
    """The tensor families that these sites read."""
    inputs: Mapping[str, tuple[str, ...]] = {site.name: site.inputs for site in plan.sites}
    return tuple(dict.fromkeys(family for name in sites for family in inputs[name]))


def changed_sites(before: Plan, after: Plan) -> tuple[str, ...]:
    """The sites whose type, or the grid of whose input, differs."""
    old = {site.name: site for site in before.sites}
    grids = [_grids(plan) for plan in (before, after)]
    found = []
    for site in after.sites:
        same = old[site.name].status == site.status and all(
            family in grids[0] and all(map(_is_same, grids[0][family], grids[1][family]))
            for family in site.inputs
        )
        if not same:
            found.append(site.name)
    return tuple(found)


def _grids(plan: Plan) -> dict[str, list[TensorPlan]]:
    """Family -> a tensor of it, in each layer."""
    found: dict[str, dict[str, TensorPlan]] = {}
    for tensor in plan.tensors:
        found.setdefault(tensor.base_family, {})[tensor.family] = tensor
    return {family: list(layers.values()) for family, layers in found.items()}


def _is_same(a: TensorPlan, b: TensorPlan) -> bool:
    """True for one grid, but for what keeps sums away from ties."""
    near = math.isclose(a.scale, b.scale, rel_tol=ties.LARGEST_STEP)
    return near and (a.zero_point, a.channels) == (b.zero_point, b.channels)
