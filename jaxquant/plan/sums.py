"""Where the sums of convolutions and dots are quantized: by moving, selecting and adding alone.

What goes round a loop, or from one layer of a scan to the next, is followed there: a residual
stream is quantized by the sites of all layers behind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from jaxquant.graph import ir, primitives
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.model import Model
from jaxquant.plan.binding import Binding

_SELECTED = "max min clamp neg concatenate stack tile slice pad reduce_max reduce_window_max"
_SELECTING = frozenset(_SELECTED.split())
_ADDING = frozenset({"add", "add_any", "sub"})


class SumScales(NamedTuple):
    """Where the float value of a tensor is quantized.

    Attributes:
      alone: the scales on which it is quantized by itself, moved or selected from; none where it is
        added to another tensor before.
      together: those of all that is quantized from it and what it is added to or selected with.
    """

    alone: frozenset[str]
    together: frozenset[str]


@dataclasses.dataclass(frozen=True, eq=False)
class ScaledGraph:
    """A graph, or one layer of a loop's body, with what is quantized in it.

    Attributes:
      graph: it.
      scales: the tensors that are quantized from float -> the names of their scales.
      rounded: those that everybody reads as what their int8 form stands for.
      bodies: of its loops and choices, by the index of their equation: each body, and its layers.
    """

    graph: ir.Graph
    scales: Mapping[ir.Var, str]
    rounded: frozenset[ir.Var] = frozenset()
    bodies: Mapping[int, Sequence[tuple[Model, Sequence[ScaledGraph]]]] = dataclasses.field(
        default_factory=dict
    )

    @staticmethod
    def of(binding: Binding) -> ScaledGraph:
        """The graph of a binding, with those of its bodies."""
        suffix = layer_suffix(binding.layer)
        return ScaledGraph(
            binding.graph,
            {var: binding.scales[var] + suffix for var in binding.names},
            binding.forms.rounded,
            {
                index: [
                    (body.model, [ScaledGraph.of(layer) for layer in body.layers])
                    for body in bodies
                ]
                for index, bodies in binding.bodies.items()
                if any(body.layers[0].holds_int8 for body in bodies)
            },
        )


_Node: TypeAlias = tuple[ScaledGraph, ir.Var]


def find_sums(scaled: ScaledGraph) -> dict[ScaledGraph, dict[ir.Var, SumScales]]:
    """The tensors whose values arrive at a quantization by moving, selecting and adding alone.

    Args:
      scaled: a whole model.

    Returns:
      Of it and of the graph of each layer in it, the tensors.
    """
    search = _Search()
    search.visit(scaled)
    return search.found()


class _Search:
    """Follows values backwards, from where they are quantized."""

    def __init__(self) -> None:
        self._parent: dict[_Node, _Node] = {}
        self._reached: dict[_Node, frozenset[str]] = {}
        self._first: dict[str, _Node] = {}
        self._added: set[_Node] = set()
        self._graphs: dict[ScaledGraph, None] = {}

    def found(self) -> dict[ScaledGraph, dict[ir.Var, SumScales]]:
        together: dict[_Node, frozenset[str]] = {}
        for node, names in self._reached.items():
            # Sums that an addition or a choice brings together have to fit each other.
            root = self._root(node)
            together[root] = together.get(root, frozenset()) | names
        sums: dict[ScaledGraph, dict[ir.Var, SumScales]] = {scaled: {} for scaled in self._graphs}
        for node, names in self._reached.items():
            if names:
                alone = frozenset[str]() if node in self._added else names
                sums[node[0]][node[1]] = SumScales(alone, together[self._root(node)])
        return sums

    def visit(self, scaled: ScaledGraph) -> None:
        """Follow the values of a graph; where those of its outputs go is known."""
        self._graphs[scaled] = None
        for var, name in scaled.scales.items():
            node = scaled, var
            self._reached[node] = self._reached.get(node, frozenset()) | {name}
            # One scale has one unit.
            self._parent[self._root(node)] = self._root(self._first.setdefault(name, node))
        for eqn in reversed(scaled.graph.equations):
            if eqn.index in scaled.bodies:
                for model, layers in scaled.bodies[eqn.index]:
                    self._loop(scaled, eqn, model, layers)
            elif _hands_on(scaled.graph, eqn):
                for var in (v for v in eqn.input_vars if not scaled.graph.static[v]):
                    if var in scaled.rounded:  # the sums end there
                        continue
                    self._link((scaled, var), (scaled, eqn.outputs[0]), _adds(scaled.graph, eqn))

    def _loop(
        self, scaled: ScaledGraph, eqn: ir.Equation, body: Model, layers: Sequence[ScaledGraph]
    ) -> None:
        """Follow the values through the layers of a body, the last one first."""
        region = body.root
        operands = dict(zip(region.arguments, region.operands, strict=True))
        carried = {region.arguments[k]: out for k, out in region.carries.items()}
        backwards = list(layers) if eqn.params.get("reverse") else list(reversed(layers))
        behind: ScaledGraph | None = None
        for layer in backwards:
            # Where its results go: into stacks, and the last layer's carry out of the loop.
            for position, result in enumerate(region.results):
                out = layer.graph.outputs[position]
                if not isinstance(out, int) or result is None or layer.graph.static[out]:
                    continue
                if position not in carried.values() or behind is None:
                    self._link((layer, out), (scaled, eqn.outputs[result]))
            # The carry of the others goes into the layer behind.
            for argument, position in carried.items():
                out = layer.graph.outputs[position]
                if behind is not None and isinstance(out, int):
                    self._link((layer, out), (behind, argument))
            self.visit(layer)
            if body.layers is None and carried:  # a step comes behind itself
                self._steps(layer, carried)
            behind = layer

            # What is no carry each layer takes from outside; the first one takes the carry too.
            for argument, operand in operands.items():
                if argument not in carried and argument not in body.leaf_operands:
                    self._enter(scaled, operand, layer, argument)
        first = backwards[-1]
        for argument in carried:
            self._enter(scaled, operands[argument], first, argument)

    def _steps(self, layer: ScaledGraph, carried: Mapping[ir.Var, int]) -> None:
        """Follow the values through as many steps of a body as a value needs to be quantized.

        Args:
          layer: the body.
          carried: for its arguments that are carried the positions of the outputs that they read.
        """
        known = None
        # What a step leaves is read by the next one, maybe only handed on by that one too: values
        # that go from one carry to another take a step for each.
        while known != (known := self._how_much()):
            for argument, position in carried.items():
                out = layer.graph.outputs[position]
                if isinstance(out, int):
                    self._link((layer, out), (layer, argument))
            self.visit(layer)

    def _how_much(self) -> tuple[int, int]:
        """How much is known, which only ever grows."""
        return sum(map(len, self._reached.values())), len(self._added)

    def _enter(
        self, scaled: ScaledGraph, operand: ir.Atom | None, layer: ScaledGraph, argument: ir.Var
    ) -> None:
        if isinstance(operand, int) and not scaled.graph.static[operand]:
            self._link((scaled, operand), (layer, argument))

    def _link(self, node: _Node, behind: _Node, adds: bool = False) -> None:
        """A value is handed on, as it is or added to another one."""
        # Whatever is linked in any way needs one unit: sets that are merged, by union and find.
        self._parent[self._root(node)] = self._root(behind)
        reached = self._reached.get(node, frozenset()) | self._reached.get(behind, frozenset())
        self._reached[node] = reached
        if adds or behind in self._added:
            self._added.add(node)

    def _root(self, node: _Node) -> _Node:
        while (above := self._parent.setdefault(node, node)) != node:
            node = above
        return node


def hands_on(scaled: ScaledGraph, eqn: ir.Equation) -> bool:
    """True for what moves, selects or adds, and for a loop whose values are followed."""
    return eqn.index in scaled.bodies or _hands_on(scaled.graph, eqn)


def _adds(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for a sum of two activations."""
    return eqn.name in _ADDING and sum(not graph.static[v] for v in eqn.input_vars) == 2


def _hands_on(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True for what moves, selects or adds."""
    return _adds(graph, eqn) or eqn.name in _SELECTING or primitives.is_movement(graph, eqn)
