"""The int8 sites of one graph as operations of a network."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxquant.deploy.network import Int8Node, Node
from jaxquant.deploy.stored_tensors import StoredTensors
from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.sites import Site
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.groups import group_layout


class SiteNodes(StoredTensors, abc.ABC):
    """The int8 sites of a graph; what goes through the graph gives its other operations."""

    @abc.abstractmethod
    def node(self, eqn: ir.Equation) -> Node:
        """An equation as it is."""

    @abc.abstractmethod
    def need_static(self, atoms: Iterable[Any]) -> None:
        """Give the static tensors among `atoms` a leaf, a constant or nodes that compute them."""

    def add_dequantized(self, site: Site) -> None:
        """Add a site that computes in float, and its weight, which is dequantized before it."""
        assert site.weight is not None
        graph, eqn = self.graph, self.graph.equations[site.equation]
        view = self.program.weights.view(site)
        groups = group_layout(view.shape, view.channels, self.program.plan.group_size)
        weight = self.dequantize(self.program.slots[site.name], groups, view.var)
        # A weight that is copied along an axis is stored without the copies.
        if view.shape != graph.shape(view.var):
            axes, number = tuple(range(len(view.shape))), self.new(graph, view.var)
            params = {"broadcast_dimensions": axes, "shape": graph.shape(view.var)}
            self.add("broadcast_in_dim", (weight,), (number,), params)
            weight = number
        # What is stored is the parameter; the dot reads it transposed or copied, as the model does.
        for movement in view.movements:
            number = self.new(graph, movement.outputs[0])
            moved = self.node(movement)
            self.nodes.append(dataclasses.replace(moved, inputs=(weight,), outputs=(number,)))
            weight = number
        self.need_static(x for x in eqn.inputs if x != site.weight)
        node = self.node(eqn)
        inputs = [weight if x == site.weight else y for x, y in zip(eqn.inputs, node.inputs)]
        self.nodes.append(dataclasses.replace(node, inputs=tuple(inputs)))

    def int8_node(self, int8_site: Int8Site) -> Int8Node:
        """An int8 site, with its weight and what its epilogue absorbs."""
        graph, site, epilogue = self.graph, int8_site.site, int8_site.epilogue
        eqn = graph.equations[site.equation]
        weight, computed = "", None
        axes: tuple[int, ...] = ()
        if site.weight is not None:
            axes = site.channel_axes
            # Stored as integers, or float and rounded when the weight is known.
            if site.computes_weight:
                self.need_static((site.weight,))
                computed = self.number(site.weight)
            else:
                weight = self.stored_name(self.program.slots[site.name].int8, site.weight)
        return Int8Node(
            name=site.name + layer_suffix(self.binding.layer),
            kind=site.kind,
            node=self.node(eqn),
            operands=tuple(self.number(v) for v in site.operands),
            weight=weight,
            computed_weight=computed,
            weight_position=site.weight_position,
            weight_axes=axes,
            movements=tuple(self.node(e) for e in epilogue.movements),
            channel_sizes=tuple(int(size) for size in epilogue.channels.sizes),
            channel_axes=epilogue.channels.axes,
            output=self.number(epilogue.output),
            dynamic=int8_site.dynamic,
            asymmetric=int8_site.asymmetric,
        )

    def add_lookup(self, site: Site) -> None:
        """Add the lookup of rows among integers and their scales."""
        assert site.weight is not None
        eqn, slot = self.graph.equations[site.equation], self.program.slots[site.name]
        view = self.program.weights.view(site)
        groups = group_layout(view.shape, view.channels, self.program.plan.group_size)
        # The table itself is not asked for: it stays as it is stored.
        self.need_static(eqn.inputs[1:])
        node = self.node(eqn)
        stored = self.take_stored(slot, site.weight)
        params = {**node.params, "groups": groups, "bits": slot.weight_bits}
        inputs = (*stored, node.inputs[1])
        self.nodes.append(dataclasses.replace(node, op="look_up", inputs=inputs, params=params))
