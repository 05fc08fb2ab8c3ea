"""What differs between two plans of a model."""

from __future__ import annotations

import math

from jaxquant.plan import ties
from jaxquant.plan.binding import Binding
from jaxquant.plan.plan import TensorPlan
from jaxquant.tune.switchable import by_layer, find_switchable


def changed_sites(before: Binding, after: Binding) -> tuple[str, ...]:
    """The sites whose type, or the grid of whose input, differs.

    Where that is in some of a site's layers, these: "NAME[3]".
    """
    old, new = by_layer(before), by_layer(after)
    differing = {
        name
        for name, (site, tensors) in new.items()
        # A site that one of both lacks is one whose scan was cut otherwise.
        if name in old
        and (
            old[name].site.status != site.status
            or len(old[name].tensors) != len(tensors)
            or not all(map(_is_same, old[name].tensors, tensors))
        )
    }
    names = [site.name for site in before.whole_plan.sites]
    found: list[str] = []
    # A site all of whose layers differ is named as one.
    for name, each in find_switchable(before.model, names, single_layers=False).items():
        layers = [layer for layer in each.layer_names if layer in differing]
        found += [name] if len(layers) == len(each.layers) else layers
    return tuple(found)


def _is_same(a: TensorPlan, b: TensorPlan) -> bool:
    """True for one grid, but for what keeps sums away from ties."""
    near = math.isclose(a.scale, b.scale, rel_tol=ties.LARGEST_STEP)
    return near and (a.zero_point, a.channels) == (b.zero_point, b.channels)
