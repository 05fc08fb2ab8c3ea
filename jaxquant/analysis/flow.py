"""Which sites feed which, through the loops and choices of a model too."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxquant.graph import ir
from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.model import Model
from jaxquant.plan.bind import is_elsewhere
from jaxquant.plan.binding import Binding

_Body = tuple[Model, Sequence["Flow"]]


@dataclasses.dataclass(frozen=True, eq=False)
class Flow:
    """A graph, or one layer of a loop's body, with the sites in it.

    Attributes:
      graph: it.
      names: the outputs of its sites -> their names, in scans over stacked weights "NAME[3]".
      operands: of a body its tensors that come from elsewhere -> where they come from.
      bodies: of its loops and choices, by the index of their equation: each body, and its layers
        in the order in which they run.
    """

    graph: ir.Graph
    names: Mapping[ir.Var, str]
    operands: Mapping[ir.Var, tuple[Flow, ir.Var]]
    bodies: dict[int, list[_Body]] = dataclasses.field(default_factory=dict)
    inputs: dict[str, tuple[ir.Var, ...]] = dataclasses.field(default_factory=dict)

    def walk(self) -> Iterator[Flow]:
        """Itself and the layers of the bodies inside."""
        yield self
        for bodies in self.bodies.values():
            for _, layers in bodies:
                for layer in layers:
                    yield from layer.walk()

    def feeding(self, start: Sequence[ir.Var]) -> tuple[str, ...]:
        """The sites that some tensors are computed from, with no other in between.

        In a loop whose weights are the same in all steps what the step before gives is left out:
        a site would be behind itself.
        """
        found: dict[str, None] = {}
        stack: list[tuple[Flow, ir.Var]] = [(self, var) for var in start]

        # A tensor that many read is gone through once.
        seen = set(stack)
        while stack:
            flow, var = stack.pop()
            if var in flow.names:
                found[flow.names[var]] = None
                continue
            # Past movements and float operations; the first site on each way is what feeds.
            reads = [node for node in flow._sources(var) if node not in seen]
            stack += reads
            seen.update(reads)
        return tuple(found)

    def _sources(self, var: ir.Var) -> Iterator[tuple[Flow, ir.Var]]:
        """What a tensor is computed from by one equation, or where it comes from."""
        if var in self.operands:
            yield self.operands[var]
            return
        eqn = self.graph.producer.get(var)
        if eqn is None:
            return
        # Of any other equation everything it reads counts, whatever it does with it.
        if eqn.index not in self.bodies:
            yield from ((self, v) for v in eqn.input_vars)
            return
        result = eqn.outputs.index(var)
        # The result of a loop comes out of its last step, a stack out of every one.
        for body, layers in self.bodies[eqn.index]:
            carried = set(body.root.carries.values())
            for position, into in enumerate(body.root.results):
                out = body.graph.outputs[position]
                if into == result and isinstance(out, int):
                    yield from (
                        (layer, out) for layer in (layers[-1:] if position in carried else layers)
                    )


def find_flow(binding: Binding, shown: Collection[str]) -> Flow:
    """A model, with those of its sites that are shown.

    Args:
      binding: of the whole model.
      shown: the names of the sites, with their layers.
    """
    return _flow_of(binding, shown, {})


def _flow_of(
    binding: Binding, shown: Collection[str], operands: Mapping[ir.Var, tuple[Flow, ir.Var]]
) -> Flow:
    # A site gives what its epilogue does, where it has one.
    ends = {each.site.name: each.epilogue.output for each in binding.sites}
    sites = {
        of_layer(site.name, binding.layer): site
        for site in binding.model.sites
        if not is_elsewhere(binding.model, site)
    }
    sites = {name: site for name, site in sites.items() if name in shown}
    # What follows a site reads what its epilogue gives, which is behind BatchNorms and clips.
    outputs = {ends.get(site.name, site.output): name for name, site in sites.items()}
    names = {var: name for var, name in outputs.items() if var is not None}
    flow = Flow(binding.graph, names, operands)
    flow.inputs.update({name: site.operands for name, site in sites.items()})

    # The layers in the order in which they run: each one's carry is what the one before gives.
    for index, bodies in binding.bodies.items():
        backwards = binding.graph.equations[index].params.get("reverse", False)
        flow.bodies[index] = []
        for body in bodies:
            before: Flow | None = None
            layers: list[Flow] = []
            for layer in reversed(body.layers) if backwards else body.layers:
                before = _flow_of(layer, shown, _operands(flow, body.model, before))
                layers.append(before)
            flow.bodies[index].append((body.model, layers))
    return flow


def _operands(outer: Flow, body: Model, before: Flow | None) -> dict[ir.Var, tuple[Flow, ir.Var]]:
    """Where the arguments of a body come from, in the layer that runs after `before`."""
    region, found = body.root, {}
    for place, argument in enumerate(region.arguments):
        source = region.operands[place]
        flow = outer
        if before is not None and place in region.carries:
            flow, source = before, before.graph.outputs[region.carries[place]]
        if isinstance(source, int):
            found[argument] = flow, source
    return found
