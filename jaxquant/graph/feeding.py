"""Which weights an operation without a weight of its own reads after all.

They tell the layer of a product of activations, and that one of its factors is a weight that the
model picks by a number that it computes: an expert, the layer of a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jaxquant.graph import ir, primitives
from jaxquant.graph import trace as tracing
from jaxquant.graph.regions import CONTROL_FLOW, Region

_Place = tuple[Region, ir.Var]


def module_feeding(region: Region, eqn: ir.Equation) -> tuple[str, ...]:
    """The path that all modules have in common whose weights feed an operation.

    Those are the nearest ones before it, through loops and choices too: of attention's scores
    those of the queries and keys, whose modules are in the one of their layer.

    Args:
      region, eqn: the operation.
    """
    # Back from the operands to the nearest weights, out of bodies and into those of loops; no
    # further than the first weight on each way.
    stack: list[_Place] = [(region, var) for var in eqn.input_vars]
    seen, modules = set(stack), []
    while stack:
        place, var = stack.pop()
        graph = place.graph
        producer = graph.producer.get(var)
        # Weights are no way to go further back.
        if graph.static[var]:
            continue
        if producer is None:
            # An input of a body is what the loop gives it.
            before = _outside(place, var)
        elif path := _weight_path(graph, producer):
            # Without the parameter's own name: its module.
            modules.append(path.split("/")[:-1])
            continue
        elif producer.name in CONTROL_FLOW:
            before = _results(place, producer, producer.outputs.index(var))
        else:
            before = [(place, v) for v in producer.input_vars]
        stack += [each for each in before if each not in seen]
        seen.update(before)
    return _common(modules)


def picked_weight(graph: ir.Graph, var: ir.Var) -> str:
    """The path of the parameter that a tensor is a part of, picked by a computed number; or ""."""
    while (eqn := graph.producer.get(var)) is not None and not graph.static[var]:
        source = eqn.inputs[0]
        # By a number that is computed, since a static slice is a weight itself.
        if eqn.name in ("dynamic_slice", "gather") and graph.is_static(source):
            return tracing.path_of(graph, source) if isinstance(source, int) else ""
        picks = eqn.name in ("dynamic_slice", "gather", "convert_element_type")
        if not isinstance(source, int) or not (picks or primitives.is_movement(graph, eqn)):
            return ""
        var = source
    return ""


def _common(paths: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """What several paths begin with."""
    alike = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return tuple(parts[0] for parts in alike)


def _weight_path(graph: ir.Graph, eqn: ir.Equation) -> str:
    """The path of the parameter that a convolution or dot multiplies by; "" where it has none."""
    if eqn.index not in graph.contractions:
        return ""
    # Of several parameters in the weight the largest names it.
    sources = [v for var in eqn.input_vars if graph.static[var] for v in graph.sources(var)]
    return graph.paths[tracing.largest(graph, sources)] if sources else ""


def _outside(region: Region, var: ir.Var) -> list[_Place]:
    """What an input of a body is: of a loop in the first step, and in those behind it."""
    found: list[_Place] = []
    if region.holder is None or var not in region.arguments:
        return found
    position = region.arguments.index(var)
    outputs: Sequence[ir.Atom] = region.graph.outputs
    # A carry is what the loop began with, or what the step before gave.
    for place, atom in (
        (region.holder, region.operands[position]),
        (region, outputs[region.carries[position]] if position in region.carries else None),
    ):
        if isinstance(atom, int):
            found.append((place, atom))
    return found


def _results(region: Region, eqn: ir.Equation, position: int) -> list[_Place]:
    """What a result of a loop or choice is in its bodies."""
    return [
        (body, atom)
        for body in region.bodies(eqn)
        for atom, result in zip(body.graph.outputs, body.results, strict=True)
        if result == position and isinstance(atom, int)
    ]
