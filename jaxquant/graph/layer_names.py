"""Names of layers: in messages, of operations that have no weight; of those of a scan; alike."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence

from jaxquant.graph import ir
from jaxquant.graph.naming import module_of
from jaxquant.graph.primitives import is_elementwise

_NUMBER = re.compile(r"\[\d+(?::\d+)?\]|\d+")
_SEGMENT = re.compile(r"(.*)\[(\d+)(?::\d+)?\]")


def layer_of(graph: ir.Graph, eqn: ir.Equation, classes: Mapping[str, str]) -> str:
    """How a message names the layer of an operation without a weight, "BatchNorm 'bn1'".

    It is named by its scope; without one by the first parameter that is applied to what it gives
    (the scale of a normalization), or by the last one before it.
    """
    # linen's scopes are the module paths.
    if eqn.scope:
        return _spell(eqn.modules[-1] if eqn.modules else "", eqn.scope)
    # nnx and plain functions have no scope: the first parameter that the result meets, elementwise,
    # is the layer's own (a BatchNorm's scale), else the last one before it.
    behind, seen = [*eqn.outputs], {*eqn.outputs}
    while behind:
        for user in graph.consumers.get(behind.pop(0), ()):
            path = _parameter(graph, user)
            if path and is_elementwise(user):
                module = module_of(path)
                return _spell(classes.get(module, ""), module)
            if not path:
                behind += [v for v in user.outputs if v not in seen]
                seen.update(user.outputs)
    # Backwards, so that the nearest comes first.
    for before in reversed([*ir.upstream(graph, eqn.input_vars)]):
        if path := _parameter(graph, before):
            return f"the layer behind params[{path!r}]"
    return "apply_fn"


def _parameter(graph: ir.Graph, eqn: ir.Equation) -> str:
    """The path of a parameter that an equation reads beside an activation; "" without one."""
    if not eqn.outputs or graph.static[eqn.outputs[0]]:
        return ""
    for var in eqn.input_vars:
        if graph.static[var]:
            for source in graph.sources(var):
                if source not in graph.constants:
                    return graph.paths[source]
    return ""


def _spell(cls: str, name: str) -> str:
    return f"{cls} {name!r}" if cls else f"the layer of {name!r}"


def layer_suffix(layer: Sequence[int]) -> str:
    """What the name of a tensor ends in that is there once for each layer of a scan: "[3]".

    Example:
      >>> layer_suffix([3]), layer_suffix([])
      ('[3]', '')
    """
    return "".join(f"[{number}]" for number in layer)


def of_layer(name: str, layer: Sequence[int]) -> str:
    """The name of a site or tensor in one layer of the scans around it.

    A site of a scan that is cut has the layers of its segment in its name; then it is the number
    that the layer has in the scan that was cut.

    Example:
      >>> of_layer("layers/mlp", [3]), of_layer("layers/mlp[4:12]", [3]), of_layer("head", [])
      ('layers/mlp[3]', 'layers/mlp[7]', 'head')
    """
    # A cut scan counts its layers from the segment's first.
    segment = _SEGMENT.fullmatch(name) if layer else None
    if segment is None:
        return name + layer_suffix(layer)
    first, *others = layer
    return segment[1] + layer_suffix([int(segment[2]) + first, *others])


def alike_layers(names: Iterable[str]) -> dict[str, Hashable]:
    """Site -> what it has in common with the sites that are alike: its name without its layer.

    Where the names hold several numbers, the layer is the one that differs most.

    Example:
      >>> names = [f"layers_{layer}/{part}" for layer in range(3) for part in ("a1", "a2")]
      >>> groups = alike_layers(names)
      >>> len(set(groups.values())), groups["layers_0/a1"] == groups["layers_2/a1"]
      (2, True)
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(_NUMBER.sub("#", name), []).append(name)
    groups: dict[str, Hashable] = {}
    for pattern, members in alike.items():
        numbers = [_NUMBER.findall(name) for name in members]
        # Which of several numbers is the layer's: the one that differs most.
        different = [len(set(column)) for column in zip(*numbers, strict=True)]
        layer = different.index(max(different)) if different else 0
        for name, own in zip(members, numbers, strict=True):
            groups[name] = (pattern, *own[:layer], *own[layer + 1 :])
    return groups
