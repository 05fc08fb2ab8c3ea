"""Where the arrays of a quantized model are in `qparams`.

`qparams` is a plain nested dict with three entries:

    "params":  the parameters, under their own paths.  A leaf that only int8 sites read is replaced
               by {"int8": [...], "scale": [C] or []}, in the layout that the operation uses; one
               that is read in float too keeps its array beside them as "float".  A leaf that is
               no longer read is left out.  A weight behind an equalized tensor is the parameter
               times the tensor's equalization.
    "sites":   site -> {"multiplier": [C] or [], "bias": likewise}: float32, of the epilogue.  The
               bias takes away what the zero point of the input adds to every sum.
    "tensors": tensor -> {"scale": [], "inv_scale": []}: float32; a float is multiplied by
               `inv_scale` before rounding, an integer less the plan's zero point by `scale` to get
               the float back.  Those of an equalized tensor are arrays that broadcast against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxquant.graph import ir, trace
from jaxquant.plan.bind import Int8Site
from jaxquant.plan.epilogue import channel_axes
from jaxquant.plan.liveness import is_computed_weight


@dataclasses.dataclass(frozen=True)
class WeightSlot:
    """The place of one int8 weight: a parameter's path and the name of its entry there.

    A parameter that is used in several ways (two transforms, two channel axes) has an entry each.
    """

    path: tuple[str, ...]
    view: int

    @property
    def int8(self) -> tuple[str, ...]:
        return (*self.path, f"int8_{self.view}" if self.view else "int8")

    @property
    def scale(self) -> tuple[str, ...]:
        return (*self.path, f"scale_{self.view}" if self.view else "scale")


def leaf_paths(graph: ir.Graph, params: Any) -> dict[ir.Var, tuple[str, ...]]:
    """The path components of every parameter leaf."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {var: trace.path_parts(path) for var, (path, _) in zip(graph.leaves, flat, strict=True)}


def weight_slots(
    graph: ir.Graph, sites: Sequence[Int8Site], paths: Mapping[ir.Var, tuple[str, ...]]
) -> dict[str, WeightSlot]:
    """Site name -> the place of its int8 weight; sites with the same weight share one."""
    slots: dict[Any, WeightSlot] = {}
    views: dict[tuple[str, ...], int] = {}
    found = {}
    for int8_site in sites:
        site = int8_site.site
        if site.weight is None or is_computed_weight(graph, site.weight):
            continue
        axes = channel_axes(graph, site, graph.equations[site.equation])
        key = (graph.expression(site.weight), axes)
        if key not in slots:
            source = trace.largest(graph, graph.sources(site.weight))
            path = paths.get(source, (graph.paths[source],))
            slots[key] = WeightSlot(path, views.get(path, 0))
            views[path] = views.get(path, 0) + 1
        found[site.name] = slots[key]
    return found


def get(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The entry of a nested dict at `path`."""
    for part in path:
        tree = tree[part]
    return tree


def put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set the entry of a nested dict at `path`, making the dicts on the way."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def float_paths(
    needed: Sequence[ir.Var],
    paths: Mapping[ir.Var, tuple[str, ...]],
    slots: Mapping[str, WeightSlot],
) -> dict[ir.Var, tuple[str, ...]]:
    """Where the leaves that are read in float are: under their path, or beside an int8 weight."""
    shared = {slot.path for slot in slots.values()}
    return {var: (*paths[var], "float") if paths[var] in shared else paths[var] for var in needed}
