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
from typing import NamedTuple

import numpy as np

from jaxquant.calibration.observations import TensorStats
from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan.constants import constants_of, has_infinity
from jaxquant.plan.forms import Forms
from jaxquant.plan.grid import make_grid
from jaxquant.plan.joined import Readers
from jaxquant.plan.plan import TensorPlan

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
        # Only what hands int8 through puts constants on a grid.
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
                # Seen through movements, whose results have no statistics of their own.
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
    families = _families(model, sites, forms, stats, tensors)
    readers = Readers(model, sites, forms)
    found: dict[str, str] = {}
    for site in sites:
        if not _ties(model.graph, site, forms):
            continue
        eqn = model.graph.equations[site.equation]
        tie = _tie(model, site, stats)
        family = families.get(forms.family[eqn.outputs[0]])
        # Without statistics of both sides there is nothing to compare.
        if not (tie.parts and tie.read) or family is None:
            continue

        # What the other members of the family do to this tie is another tie's matter.
        reach = max(part.abs_max for part in tie.read.values())
        lost = _worst(tie.parts, family.within(reach))
        if lost is None:
            continue
        name, kept = lost
        found[site.name] = (
            f"its parts differ in range, {tie.parts[name].abs_max:.3g} beside {reach:.3g}: one "
            f"scale would leave {kept:.0f} dB of {name}"
        )
        # What reads a join in int8 would put its parts on one scale again.
        for other in readers.of(eqn) if tie.is_join else ():
            found.setdefault(other, f"the parts of its input differ in range (see {site.name!r})")
    return found


class _Family(NamedTuple):
    """The grid that some tensors share, and the largest value on it."""

    grid: TensorPlan
    largest: float

    def within(self, reach: float) -> TensorPlan:
        """The grid that the family would have if nothing in it went beyond this."""
        share = min(1.0, reach / self.largest) if self.largest > 0 else 1.0
        threshold, scale = self.grid.threshold * share, self.grid.scale * share
        return dataclasses.replace(self.grid, threshold=threshold, scale=scale)


def _families(
    model: Model,
    sites: tuple[Site, ...],
    forms: Forms,
    stats: Mapping[str, TensorStats],
    tensors: Sequence[TensorPlan],
) -> dict[ir.Var, _Family]:
    """The families by the tensors that stand for them; arguments as of `find_uneven`."""
    grids = {tensor.name: tensor for tensor in tensors}
    found: dict[ir.Var, _Family] = {}
    for entry in forms.entries:
        name, family = model.names[entry], forms.family[entry]
        # A family reaches as far as its largest member.
        before = found[family].largest if family in found else 0.0
        found[family] = _Family(grids[name], max(before, stats[name].abs_max))
    # Constants beside the tensors (a class token, say) lie on the grid too.
    for family, beside in constants_in(model.graph, sites, forms).items():
        held = [stats[name].abs_max for name in beside if name in stats]
        found[family] = found[family]._replace(largest=max(found[family].largest, *held, 0.0))
    return found


class _Tie(NamedTuple):
    """What an operation ties to one scale.

    Attributes:
      read: the statistics of what it reads, constants too, by name.
      parts: of what may lose on the scale.
      is_join: whether it puts together what it reads.
    """

    read: Mapping[str, TensorStats]
    parts: Mapping[str, TensorStats]
    is_join: bool


def _tie(model: Model, site: Site, stats: Mapping[str, TensorStats]) -> _Tie:
    """A join loses what it reads on one scale; another operation loses what it gives."""
    graph, names = model.graph, model.names
    eqn = graph.equations[site.equation]
    constants = constants_of(graph, site)
    read = [*_named(graph, site, site.operands, names).values(), *constants]
    whole = {name: stats[name] for name in read if name in stats}
    if kinds.is_join(eqn) or constants:
        return _Tie(whole, whole, is_join=True)

    # A split loses what it gives: small parts came out of one tensor.
    given = _named(graph, site, eqn.outputs, names).values()
    return _Tie(whole, {name: stats[name] for name in given if name in stats}, is_join=False)


def _worst(parts: Mapping[str, TensorStats], grid: TensorPlan) -> tuple[str, float] | None:
    """The part that keeps least on the grid, with its SQNR in dB; None where all keep enough."""
    found = None
    for name, part in parts.items():
        kept = sqnr_on(part, grid.scale, grid.threshold)
        if kept >= (GOOD_DB if found is None else found[1]):
            continue
        # By an asymmetric grid if the shared one is: the gain is that of the range alone.
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
    # Exact zeros (of a ReLU) are in bin 0 and have no error; its neighbour tells how many are not.
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
