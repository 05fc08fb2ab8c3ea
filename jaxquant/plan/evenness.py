"""Which operations stay float because what they tie together differs too much for one scale.

An int8 operation that selects or moves values ties the scales of what it reads and gives.  A part
with a small range beside one with a large range is then rounded to a few steps, or to zero: scores
beside boxes in a concatenation, a class token beside the patches, one of the heads that a dense
layer gives together.  Calibration has seen each part, so the loss is known before anything is
quantized: the error of a part on the shared scale against that on a scale of its own.

Where a part loses too much, the operation that ties it is left in float, and so is each site that
would read what is joined on one scale without need (sums, additions, comparisons, products of two
activations).  Convolutions and dots with a weight that sum over the joined axis stay int8, with
scales for their input channels where samples show that this lessens the error at their outputs
(`jaxquant.recover.equalization`).  Behind a normalisation nothing is judged: it evens parts out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxquant.calibration.observations import TensorStats
from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.composites import PATTERNS
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.binding import Binding
from jaxquant.plan.constants import constants_of, has_infinity
from jaxquant.plan.forms import Forms
from jaxquant.plan.grid import make_grid
from jaxquant.plan.inputs import input_axes
from jaxquant.plan.plan import FLOAT, TensorPlan

GOOD_DB = 20.0  # of a part on the scale that it shares: no less is tolerated ...
GAIN_DB = 6.0  # ... where a scale of its own would give so much more
_POINTS = 8  # of each bin of a histogram, at which the rounding error is taken


@once
def constants_in(
    graph: ir.Graph, sites: tuple[Site, ...], forms: Forms
) -> Mapping[ir.Var, Sequence[str]]:
    """The tensor that stands for a family -> the names of the constants that are on its scale."""
    found: dict[ir.Var, list[str]] = {}
    for site in sites:
        eqn = graph.equations[site.equation]
        if not site.inside and eqn.index in forms.moves:
            found.setdefault(forms.family[eqn.outputs[0]], []).extend(constants_of(graph, site))
    return found


def tied_tensors(
    graph: ir.Graph, sites: Iterable[Site], forms: Forms, names: Mapping[ir.Var, str]
) -> dict[str, ir.Var]:
    """What has to be observed to judge the operations that tie scales, by name."""
    found: dict[str, ir.Var] = {}
    for site in sites:
        if not _ties(graph, site, forms):
            continue
        eqn = graph.equations[site.equation]
        found |= constants_of(graph, site)
        for parts in (site.operands, eqn.outputs):
            for var, name in _named(graph, site, parts, names).items():
                source = graph.producer.get(var)
                # A mask of -inf has no range, and is handed through as a constant.
                if source is None or not has_infinity(graph, source):
                    found[name] = var
    return found


def _named(
    graph: ir.Graph, site: Site, tensors: Iterable[ir.Var], names: Mapping[ir.Var, str]
) -> dict[ir.Var, str]:
    """The names of the statistics of what a site reads or gives, seen through rearrangements."""
    found = {}
    for position, var in enumerate(tensors):
        root = primitives.movement_root(graph, var)
        found[root] = names.get(root, f"{site.name}/output_{position}")
    return found


def _ties(graph: ir.Graph, site: Site, forms: Forms) -> bool:
    """True for a site that hands int8 through and whose parts may differ: no rearrangement."""
    eqn = graph.equations[site.equation]
    if site.inside or eqn.index not in forms.moves or has_infinity(graph, eqn):
        return False
    return not primitives.is_movement(graph, eqn)


def find_uneven(
    model: Model,
    sites: tuple[Site, ...],
    forms: Forms,
    stats: Mapping[str, TensorStats],
    tensors: Sequence[TensorPlan],
) -> dict[str, str]:
    """The sites that have to stay float, with the reason.

    Args:
      model: the traced model, which names the tensors as the observations do.
      sites: those that run in int8 now.
      forms: the int8 forms with these sites.
      stats: what calibration saw.
      tensors: the grids of the entries.

    Returns:
      Site name -> reason; empty where every part keeps enough of its accuracy.
    """
    graph, names = model.graph, model.names

    # The grid of each family, and the largest value on it: a part of the model or a constant.
    grids = {tensor.name: tensor for tensor in tensors}
    families: dict[ir.Var, TensorPlan] = {}
    largest: dict[ir.Var, float] = {}
    for entry in forms.entries:
        family = forms.family[entry]
        families[family] = grids[names[entry]]
        largest[family] = max(largest.get(family, 0.0), stats[names[entry]].abs_max)
    for family, beside in constants_in(graph, sites, forms).items():
        held = [stats[name].abs_max for name in beside if name in stats]
        largest[family] = max(largest[family], *held, 0.0)

    readers = _Readers(model, sites, forms)
    found: dict[str, str] = {}
    for site in sites:
        if not _ties(graph, site, forms):
            continue
        eqn = graph.equations[site.equation]

        # A join loses what it reads on one scale; another tie loses what it gives.
        constants = constants_of(graph, site)
        is_join = kinds.is_join(eqn) or bool(constants)
        read = [*_named(graph, site, site.operands, names).values(), *constants]
        given = _named(graph, site, eqn.outputs, names).values()
        whole = {name: stats[name] for name in read if name in stats}
        parts = whole if is_join else {name: stats[name] for name in given if name in stats}
        family = forms.family[eqn.outputs[0]]
        if not (parts and whole) or family not in families:
            continue

        # What the other members of the family do to this tie is another tie's matter.
        reach = max(part.abs_max for part in whole.values())
        share = min(1.0, reach / largest[family]) if largest[family] > 0 else 1.0
        grid = dataclasses.replace(
            families[family],
            threshold=families[family].threshold * share,
            scale=families[family].scale * share,
        )
        lost = _worst(parts, grid)
        if lost is None:
            continue

        name, kept = lost
        reason = (
            f"its parts differ in range, {parts[name].abs_max:.3g} beside {reach:.3g}: one scale "
            f"would leave {kept:.0f} dB of {name}"
        )
        if not is_join:
            found[site.name] = reason
            continue
        found[site.name] = reason
        for other in readers.of(eqn):
            found.setdefault(other, f"the parts of its input differ in range (see {site.name!r})")
    return found


def _worst(parts: Mapping[str, TensorStats], grid: TensorPlan) -> tuple[str, float] | None:
    """The part that keeps least on the grid, with its SQNR in dB; None where all keep enough."""
    found = None
    for name, part in parts.items():
        kept = sqnr_on(part, grid.scale, grid.threshold)
        if kept >= (GOOD_DB if found is None else found[1]):
            continue
        own = make_grid(part.abs_max, part.min, part.max, grid.zero_point != 0)
        if sqnr_on(part, own.scale, part.abs_max) >= kept + GAIN_DB:
            found = name, kept
    return found


def sqnr_on(stats: TensorStats, scale: float, threshold: float) -> float:
    """The SQNR in dB of a tensor that is rounded to multiples of `scale` within `threshold`.

    The values of a bin are spread over it, but for exact zeros: what bin 0 holds in excess of its
    neighbour has no error.

    Example:
      >>> counts = np.zeros(2048, np.uint64)
      >>> counts[1024:2048] = 1  # evenly from 1 to 2
      >>> round(sqnr_on(TensorStats(counts, 2.0**-10, 1.0, 2.0, 2.0, 1024), 2 / 127, 2.0))
      51
    """
    counts = np.asarray(stats.counts, np.float64).copy()
    counts[0] = min(counts[0], counts[1])
    (used,) = np.nonzero(counts)
    if not used.size:
        return math.inf
    points = (np.arange(_POINTS) + 0.5) / _POINTS
    # Several points in each bin, since a step may be finer than a bin.
    values = (used[:, None] + points) * stats.bin_width
    weights = np.repeat(counts[used, None] / _POINTS, _POINTS, axis=1)
    rounded = np.rint(np.minimum(values, threshold) / scale) * scale
    noise = float(np.sum(weights * (values - rounded) ** 2))
    signal = float(np.sum(weights * values**2))
    return 10 * math.log10(signal / noise) if noise > 0 else math.inf


class _Readers:
    """Who reads what a concatenation gives."""

    def __init__(self, model: Model, sites: Sequence[Site], forms: Forms):
        self._graph = model.graph
        self._forms = forms
        self._sites = {site.equation: site for site in sites if not site.inside}
        self._composite = {
            var: site for site in self._sites.values() if site.kind in PATTERNS
            for var in site.operands
        }  # fmt: skip
        self._bases = model.composites.bases
        self._normalising = model.composites.normalising

    def of(self, eqn: ir.Equation) -> set[str]:
        """The sites that shall read the result of a concatenation in float.

        Convolutions and dots that sum over the joined axis are not among them: they quantize it,
        each part on a scale of its own where that lessens their error.
        """
        found: set[str] = set()
        self._follow(eqn.outputs[0], _joined_axes(eqn), found)
        return found

    def _follow(self, var: ir.Var, axes: frozenset[int] | None, found: set[str]) -> None:
        """Add the sites that shall read a tensor in float to `found`.

        Args:
          var: the tensor.
          axes: those along which its parts lie; None behind a function of it, whose parts are
            read by convolutions and dots as they come.
          found: the names of sites.
        """
        if var in self._composite:
            found.add(self._composite[var].name)
        for user in self._graph.consumers.get(var, ()):
            self._read(user, axes, found)

    def _read(self, user: ir.Equation, axes: frozenset[int] | None, found: set[str]) -> None:
        graph, site = self._graph, self._sites.get(user.index)
        behaviour = behaviours.behaviour_of(site.kind, user) if site is not None else ""
        # A stored weight can take the factors of its channels back; a sum without one cannot.
        if site is not None and behaviour == behaviours.ACCUMULATE:
            stored = site.stored_weight is not None
            if not (stored and (axes is None or _sums_over(site, axes))):
                found.add(site.name)
        elif site is not None and (
            behaviour == behaviours.DECIDE or site.kind in kinds.ELEMENTWISE_KINDS
        ):
            found.add(site.name)
        elif user.index in self._forms.moves:
            if kinds.kind_of(graph, user) in ("slice", "gather"):
                return  # parts come out again, each to be judged by itself
            if site is not None and not primitives.is_movement(graph, user):
                found.add(site.name)
            moved = None if axes is None else primitives.follow_axes(graph, user, axes)
            for output in user.outputs:
                self._follow(output, moved, found)
        elif user.index not in self._normalising and user.outputs[0] in self._bases:
            self._follow(user.outputs[0], None, found)


def readers_of_joined(binding: Binding) -> set[str]:
    """The convolutions and dots that read what a concatenation in float gives, or a function of it.

    Their input channels are tried with scales of their own: see `jaxquant.recover.steps`.
    """
    model, graph = binding.model, binding.graph
    planned = binding.plan.sites
    left = {site.name for site in planned if site.status == FLOAT and site.kind == "concat"}
    joined = {site.equation for site in model.sites if site.name in left and not site.inside}
    bases = model.composites.bases

    # Back from an operand, through what keeps the range of values as it is.
    def is_joined(var: ir.Var) -> bool:
        while (eqn := graph.producer.get(var)) is not None:
            if eqn.index in joined:
                return True
            if var in bases and bases[var] != var:
                var = bases[var]
            elif eqn.name in _KEEPING or primitives.is_movement(graph, eqn):
                var = eqn.input_vars[0]
            else:
                return False
        return False

    return {
        int8_site.site.name
        for int8_site in binding.sites
        if any(is_joined(var) for var in int8_site.site.operands)
    }


_KEEPING = frozenset({"pad", "reduce_max", "reduce_window_max"})  # channels stay apart


def _joined_axes(eqn: ir.Equation) -> frozenset[int]:
    """The axes along which a concatenation or a padding lays things beside each other."""
    if eqn.name == "pad":
        config = eqn.params["padding_config"]
        return frozenset(axis for axis, pads in enumerate(config) if any(pads))
    return frozenset({int(eqn.params["axis" if eqn.name == "stack" else "dimension"])})


def _sums_over(site: Site, axes: frozenset[int]) -> bool:
    """True for a convolution or dot whose every output sums over all of these axes of its input."""
    return site.as_contraction.feature_groups == 1 and axes <= frozenset(input_axes(site))
