"""The stored weights of a program: read from `qparams`, dequantized, restored for float readers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.code_tables import as_floats
from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.groups import GroupLayout, group_layout
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan
from jaxquant.plan.restore import Restored
from jaxquant.run.dequantize import StoredWeight, dequantize_weight


class StoredWeights:
    """Where the weights of a program are.

    Args:
      graph: the traced model.
      plan: the plan.
      slots: site -> the place of its weight in `qparams`.
    """

    def __init__(self, graph: ir.Graph, plan: Plan, slots: Mapping[str, layout.WeightSlot]):
        self._graph = graph
        self._plan = plan
        self._slots = slots
        self._integer = MODES[plan.mode].integer

    def integers(self, site: Site, qparams: Mapping[str, Any]) -> jax.Array:
        """The int8 weight of a site."""
        weight: jax.Array = layout.get(qparams["params"], self._slots[site.name].int8)
        return weight

    def view(self, site: Site) -> layout.WeightView:
        """What is stored for a site."""
        return layout.weight_view(self._graph, site, self._integer)

    def groups(self, site: Site) -> GroupLayout:
        """How the scales of a site's weight lie that it dequantizes."""
        view = self.view(site)
        return group_layout(view.shape, view.channels, self._plan.group_size)

    def format(self, site: Site) -> tuple[int, str]:
        """The bits of a site's weight, and what they are."""
        return self._slots[site.name].format

    def in_groups(self, site: Site, qparams: Mapping[str, Any]) -> StoredWeight:
        """The weight of a site that dequantizes it; where others sum integers, an embedding's."""
        scale = as_floats(layout.get(qparams["params"], self._slots[site.name].scale))
        if self._integer:  # a scale for each row [V], or one for the table
            scale = jnp.broadcast_to(scale.reshape(-1, 1), (self.view(site).shape[0], 1))
        integers = self.integers(site, qparams)
        return StoredWeight(integers, scale, self.groups(site), *self.format(site))

    def stored_view(self, restored: Restored) -> layout.WeightView:
        """What is stored of a tensor that is read in float; of one layer where they are stacked."""
        return layout.weight_view(restored.stored_in, restored.site, self._integer)

    def restore(self, restored: Restored, qparams: Mapping[str, Any]) -> jax.Array:
        """A static tensor that float equations read, from the integers of a weight."""
        graph, slot = restored.stored_in, self._slots[restored.site.name]
        view = self.stored_view(restored)

        def floats(integers: jax.Array, scale: jax.Array) -> jax.Array:
            if self._integer:
                # The scales are of channels, in the layout in which the weight is stored.
                spread = [n if d in view.channels else 1 for d, n in enumerate(view.shape)]
                unit = scale.reshape(spread) if scale.ndim else scale
                value = integers.astype(jnp.float32) * unit
            else:
                groups = group_layout(view.shape, view.channels, self._plan.group_size)
                weight = StoredWeight(integers, as_floats(scale), groups, *slot.format)
                value = dequantize_weight(weight)
            return value.astype(graph.dtype(view.var))

        # A stack of layers has a scale for each layer, as its parts have.
        for _ in restored.stacked:
            floats = jax.vmap(floats)
        stored = [layout.get(qparams["params"], path) for path in (slot.int8, slot.scale)]
        return restored.apply(floats(*stored))
