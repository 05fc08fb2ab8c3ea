"""What is int8 or float by itself: sites, and single layers of scans that can be cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.model import Model
from jaxquant.plan.binding import Binding
from jaxquant.plan.plan import SitePlan, TensorPlan
from jaxquant.plan.segments import why_not_cut

Layer = tuple[int, ...]  # of the scans over stacked weights around a site, outermost first


class Switchable(NamedTuple):
    """A site, or a layer of it.

    Attributes:
      site: its name.
      scans: the numbers of layers of the scans around it.
      number: which layer of the outermost scan; None for all.
    """

    site: str
    scans: Layer
    number: int | None = None

    def choices(self, chosen: bool) -> np.ndarray:
        """For every layer of the site whether it is of these and chosen, bool [*scans]."""
        found = np.zeros(self.scans, bool)
        found[() if self.number is None else self.number] = chosen
        return found

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Its layers."""
        return tuple(layer for layer in np.ndindex(self.scans) if self.number in (None, *layer[:1]))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The names of its site in its layers, "NAME[3]"."""
        return tuple(of_layer(self.site, layer) for layer in self.layers)


def find_switchable(
    model: Model, names: Sequence[str], single_layers: bool
) -> dict[str, Switchable]:
    """Some sites, or their layers, by name, in the order in which Python loops would have them.

    Args:
      model: a whole model.
      names: of the sites, in evaluation order.
      single_layers: whether each layer of a scan is apart, where the scan can be cut.
    """
    known = {site.name: site for site in model.located}
    found: list[tuple[tuple[int, int, int], str, Switchable]] = []
    for place, name in enumerate(names):
        site = known[name]
        top, whole = site.location[0], Switchable(name, site.scans)
        # A scan that cannot be cut has one program for all of its layers.
        if not (single_layers and site.scans) or why_not_cut(model, site):
            found.append(((top, 0, place), name, whole))
            continue
        backwards = model.graph.equations[top].params["reverse"]
        for number in range(site.scans[0]):
            # In the order in which a Python loop would come to them.
            turn = -number if backwards else number
            one = whole._replace(number=number)
            found.append(((top, turn, place), of_layer(name, (number,)), one))
    return {name: each for _, name, each in sorted(found)}


class SiteLayer(NamedTuple):
    """One layer of a site in a plan.

    Attributes:
      site: its plan.
      tensors: of what it reads on grids, there.
    """

    site: SitePlan
    tensors: tuple[TensorPlan, ...]


def by_layer(binding: Binding) -> dict[str, SiteLayer]:
    """Every layer of every site of a plan, by the site's name in it, "NAME[3]".

    Args:
      binding: of a whole model.
    """
    plan, scans = binding.whole_plan, {s.name: s.scans for s in binding.model.located}
    grids = {(tensor.base_family, tensor.layer): tensor for tensor in plan.tensors}
    return {
        of_layer(site.name, layer): SiteLayer(
            site, tuple(grids[family, layer] for family in site.inputs)
        )
        for site in plan.sites
        for layer in np.ndindex(scans[site.name])
    }
