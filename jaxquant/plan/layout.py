"""Where the arrays of a quantized model are in `qparams`.

`qparams` is a plain nested dict with three entries:

    "params":  the parameters, under their own paths.  A leaf that only int8 sites read is replaced
               by {"int8": [...], "scale": [C] or []}, in the layout that the operation uses; one
               that is read in float too is read from there (`jaxquant.plan.restore`), and keeps its
               array beside them as "float" only where it does not follow from them.  A leaf
               that is no longer read is left out.  Where the weights alone are quantized, "scale"
               is [..., G, ...], bfloat16 where groups have a size, see `jaxquant.plan.groups`, and
               4-bit integers are "int4", two in each uint8; likewise codes, "nf4" and "mxfp4",
               see `jaxquant.code_tables`, of which the latter have uint8 exponents for scales.
               A weight behind a tensor that is divided by channel is the parameter times what it
               is divided by.
    "sites":   site -> {"multiplier": [C] or [], "bias": likewise}: float32, of the epilogue.  The
               bias takes away what the zero point of the input adds to every sum.  Where the
               weight is stored, the input's scale planned and int32 holds it, it is a whole number
               of multipliers; the multiplier of a channel whose weight is all zero is 0 there.
               Of a ragged dot also "relative_scale": [C], of the channels of all that rows choose
               from: the multiplier [C / G] has the largest scale of G, of which these are parts.
               Of a dot whose rows get a scale and a zero point in the call also "weight_sum":
               int32 [C], what a step of the zero point adds to each sum.
               Where the weights alone are quantized there is no such entry.
    "tensors": tensor -> {"scale": [], "inv_scale": []}: float32; a float is multiplied by
               `inv_scale` before rounding, an integer less the plan's zero point by `scale` to get
               the float back.  Those of a tensor with a scale for each channel are arrays that
               broadcast against it.

All of these have a leading axis, the layers, for what is inside a scan over stacked weights (one
for each such scan around it), but for a weight that the layers share; and a tensor has its zero
points, int32 [L], beside its scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.code_tables import INT
from jaxquant.graph import copies, ir, trace
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan.epilogue import stored_shape
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan


@dataclasses.dataclass(frozen=True)
class WeightSlot:
    """The place of one int8 weight: a parameter's path and the name of its entry there.

    A parameter that is used in several ways (two transforms, two channel axes) has an entry each.
    Its entry is named after the `weight_bits` of its integers, or the `weight_dtype` of its codes.
    """

    path: tuple[str, ...]
    view: int
    weight_bits: int = 8
    weight_dtype: str = INT

    @property
    def format(self) -> tuple[int, str]:
        """The bits, and what they are."""
        return self.weight_bits, self.weight_dtype

    @property
    def int8(self) -> tuple[str, ...]:
        name = f"int{self.weight_bits}" if self.weight_dtype == INT else self.weight_dtype
        return (*self.path, f"{name}_{self.view}" if self.view else name)

    @property
    def scale(self) -> tuple[str, ...]:
        return (*self.path, f"scale_{self.view}" if self.view else "scale")


@dataclasses.dataclass(frozen=True)
class WeightView:
    """The tensor that is stored for a site, and how the site's weight is made of it.

    Attributes:
      var: the tensor; what is stored has size 1 along axes that hold copies.
      shape: of what is stored.
      channels: the axes of `var` that run along output channels.
      movements: the equations from `var` to the weight, in order: transposes and broadcasts.
    """

    var: ir.Var
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    movements: tuple[ir.Equation, ...]


@once
def weight_view(graph: ir.Graph, site: Site, integer: bool) -> WeightView:
    """What is stored for a site.

    An integer operation takes its weight as it is stored, and so does a dot that is tied to an
    embedding (`jaxquant.graph.tied`).  Where weights are dequantized in the
    call, what is stored is seen through transposes and broadcasts, so that an embedding that is
    transposed for the output layer is stored once.  Of an embedding, rows are looked up in what is
    stored.
    """
    assert site.weight is not None
    own = graph.equations[site.equation]
    var, channels = site.weight, site.channel_axes
    if integer:
        # An integer operation takes what it reads: a transpose would be of integers in each call.
        return WeightView(var, stored_shape(graph, site), channels, ())
    # Weight-only products read the weight before its transposes and copies, so that what is stored
    # is the parameter in its own layout, shared by all that read it.
    movements: list[ir.Equation] = []
    while own.name != "gather" and (eqn := graph.producer.get(var)) is not None:
        if eqn.name == "transpose":
            source = tuple(eqn.params["permutation"])
            channels = tuple(sorted(source[a] for a in channels))
        elif eqn.name == "broadcast_in_dim" and len(eqn.input_vars) == 1:
            placed = tuple(eqn.params["broadcast_dimensions"])
            # A copy along an axis is stored once.
            channels = tuple(placed.index(a) for a in channels if a in placed)
        else:
            break
        movements.insert(0, eqn)
        var = eqn.input_vars[0]
    # Rows are looked up in the table as it is: no axis of it is a copy.
    shape = graph.shape(var) if own.name == "gather" else copies.shape_without_copies(graph, var)
    return WeightView(var, shape, channels, tuple(movements))


def leaf_paths(graph: ir.Graph, params: Any) -> dict[ir.Var, tuple[str, ...]]:
    """The path components of every parameter leaf."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {var: trace.path_parts(path) for var, (path, _) in zip(graph.leaves, flat, strict=True)}


def weight_slots(
    parts: Sequence[tuple[Model, Sequence[Site]]],
    paths: Iterable[tuple[str, ...]],
    plan: Plan,
) -> dict[str, WeightSlot]:
    """Site name -> the place of its int8 weight; sites with the same weight share one.

    Those in loops and choices share it with those outside, and with one another.

    Args:
      parts: a model and its bodies, outermost first, and the quantized sites of each.
      paths: of the parameters.
      plan: the whole plan.
    """
    integer = MODES[plan.mode].integer
    formats = {site.name: (site.weight_bits, site.weight_dtype) for site in plan.sites}
    # A parameter's name in the graph is its path, joined.
    by_name = {"/".join(path): path for path in paths}
    slots: dict[Any, WeightSlot] = {}
    views: dict[tuple[str, ...], int] = {}
    found = {}
    for model, sites in parts:
        graph = model.graph
        for site in sites:
            weight = site.stored_weight
            if weight is None:
                continue
            # Computed alike from the same parameter means stored once, wherever it is read.
            view = weight_view(graph, site, integer)
            key = (model.expression(view.var), view.channels, formats[site.name])
            if key not in slots:
                # Under its largest parameter, with a number where that has several weights in it.
                name = graph.paths[trace.largest(graph, graph.sources(weight))]
                path = by_name.get(name, (name,))
                slots[key] = WeightSlot(path, views.get(path, 0), *formats[site.name])
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


def joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested dicts with different leaves as one."""
    # A copy, since the first dict is shared by all layers.
    found = dict(a)
    for key, value in b.items():
        both = key in found and isinstance(value, Mapping)
        found[key] = joined(found[key], value) if both else value
    return found


def float_paths(
    needed: Sequence[ir.Var],
    paths: Mapping[ir.Var, tuple[str, ...]],
    slots: Mapping[str, WeightSlot],
) -> dict[ir.Var, tuple[str, ...]]:
    """Where the leaves that are read in float are: under their path, or beside an int8 weight."""
    # An int8 weight has its path as a dict, in which the float is one more entry.
    shared = {slot.path for slot in slots.values()}
    return {var: (*paths[var], "float") if paths[var] in shared else paths[var] for var in needed}
