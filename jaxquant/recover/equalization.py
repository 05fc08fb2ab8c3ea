"""Equalization: a step of its own for each input channel of a site, which the weight takes back.

x · W = (x / e) · (e W) for any e > 0 per input channel.  An int8 tensor that only convolutions and
dots with a stored weight read is divided by e as it is quantized (its scale becomes a vector), and
the weights are multiplied by e before they are quantized.  Nothing is said of the activation before
the tensor, since no parameter in front of it changes: ReLU, ReLU6 and all others are handled alike.
Depthwise and grouped convolutions are too; for a depthwise one e ends in the weight's scales, so
that it is a scale of the activations for each group.

"equalization" is the cross-layer equalization of M. Nagel et al., Data-Free Quantization through
Weight Equalization and Bias Correction, 2019, e = r^α / w^(1-α) with α = 1/2, r the channel's range
and w the largest magnitude of its weights.  Other than there, r is of the quantized tensor instead
of the weight before it, and of several α, none included, that of the least error is taken, tried at
the outputs of the sites behind the tensor on rows of the calibration samples.
"smoothquant" is the migration of G. Xiao et al., SmoothQuant, 2023: dots alone, α = 1/2.

No channel's step is larger than the tensor's was (e <= 1): what a channel of small weights loses to
a coarse grid is alike at all positions of an image, so that no later mean takes it away, and the
error at the site does not tell (EfficientNet-Lite0 lost 0.7 dB by one such tensor).

r is not what calibration showed of a channel but how far its tail may go
(`jaxquant.recover.channels.reach`), the tensor's own range at most: images that calibration did not
see exceed a channel's largest value often, the tensor's seldom.

Zero points are chosen after dividing.  Where one channel is far larger than the others, the plan's
grid knows no other: behind a GELU, whose least value is -0.17, a channel of 90 leaves no step below
zero, whatever the others are divided by.  The zero points of the divided channels are tried beside
the plan's (`candidate_grids`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.evenness import readers_of_joined
from jaxquant.plan.grid import SMALLEST_SCALE, Grid, make_grid
from jaxquant.plan.inputs import along_weight, input_axes
from jaxquant.plan.plan import TensorPlan
from jaxquant.recover.channels import Divisible, Seen, reach, watch
from jaxquant.recover.product import Product
from jaxquant.recover.step import Draft, Step, Task
from jaxquant.recover.trial import InputGrid, Trial
from jaxquant.run.program import Program, program_by_site
from jaxquant.weights.fold import fold
from jaxquant.weights.quantize import quantize_params

ALPHAS: Mapping[str, tuple[float, ...]] = {
    "equalization": (0.25, 0.5, 0.75, 1.0),
    "smoothquant": (0.5,),
}
Where = Mapping[str, frozenset[str]]  # step -> the names of the sites that have it
_WORTH = 0.9  # an equalization is worth it where the error falls to this part
_SMALLEST = 1 / 64  # of the middle channel's range: the least range of a channel


class Divided(NamedTuple):
    """How a tensor is quantized after dividing.

    Attributes:
      factors: float64 of the tensor's rank, of size 1 but along its input channels: what the
        channels are divided by.
      grid: what the divided tensor is quantized on.
    """

    factors: np.ndarray
    grid: Grid


def find_divisible(program: Program, where: Where) -> dict[str, Divisible]:
    """The tensors all of whose readers have one of the steps, by name.

    Not among them are tensors whose integers are moved, compared or averaged, inputs of sites that
    share their weight with a site elsewhere, and of dots whose weight has batch axes.
    """
    graph, binding = program.graph, program.binding
    readers: dict[ir.Var, list[Site]] = {}
    users: dict[layout.WeightSlot, set[ir.Var]] = {}
    for site in (s.site for s in binding.sites):
        for var in site.operands:
            readers.setdefault(var, []).append(site)
            if site.name in program.slots:
                users.setdefault(program.slots[site.name], set()).add(var)
    # What is read in float would be equalized along with it.
    shared = {program.slots[restored.site.name] for restored in program.restored.values()}
    families = list(binding.forms.family.values())
    found = {}
    for var, name in binding.names.items():
        sites = readers.get(var, [])
        alone = families.count(binding.forms.family[var]) == 1
        stored = all(s.name in program.slots and users[program.slots[s.name]] == {var}
                     and program.slots[s.name] not in shared for s in sites)  # fmt: skip
        decided = any(e.index in binding.decisions for e in graph.consumers.get(var, ()))
        if not (sites and alone and stored) or decided:
            continue
        products = tuple(Product(graph, site) for site in sites)
        axes = {input_axes(p.site) for p in products}
        if len(axes) > 1 or any(p.reason for p in products):
            continue
        dots = all(p.site.as_contraction.window is None for p in products)
        asked = where.get("equalization", frozenset())
        if dots:
            asked |= where.get("smoothquant", frozenset())
        if asked.issuperset(site.name for site in sites):
            found[name] = Divisible(var, axes.pop(), products)
    return found


def equalize(task: Task, draft: Draft) -> Draft:
    """Divide every tensor that gains by it: the channels of what sites with these steps read.

    What a concatenation in float gives has parts that need scales of their own, so its readers are
    equalized whether that is asked for or not.
    """
    plan, binding = draft.program.plan, draft.program.binding
    where: dict[str, frozenset[str]] = {
        step: plan.recovered_by(step) for step in STEP.names if step in plan.recover
    }
    chosen, behind = list(where), ""
    joined = frozenset(readers_of_joined(binding)).difference(*where.values())
    if joined:
        behind = "" if chosen else " behind concatenations in float"
        chosen = chosen or ["equalization"]
        where["equalization"] = where.get("equalization", frozenset()) | joined
    if not chosen:
        return draft
    name, params = " and ".join(chosen), task.source.params
    everywhere = frozenset(site.site.name for site in binding.sites)
    total = len(find_divisible(draft.program, dict.fromkeys(where, everywhere)))
    with task.progress.stage(name):
        found = find_divided(task, draft, where)
        note = f"{len(found)} of {total} tensors{behind}"
        if not found:
            return draft if behind else draft.replaced(name, note)
        tensors = [_divided(t, found[t.name]) if t.name in found else t for t in plan.tensors]
        divisors = {name: divided.factors for name, divided in found.items()}
        # Other zero points, and scales along channels, are another program.
        binding = binding.with_tensors(tuple(tensors))
        return draft.replaced(
            name,
            note,
            program=program_by_site(binding, params),
            qparams=quantize_params(binding, params, divisors),
            divisors=divisors,
        )


STEP = Step(names=("equalization", "smoothquant"), run=equalize, is_automatic=True)


def find_divided(task: Task, draft: Draft, where: Where) -> dict[str, Divided]:
    """Tensor name -> how it is divided, for the tensors that gain by it.

    Args:
      task: the float model and the samples.
      draft: the int8 model, nothing of it divided; the gains of its sites are read.
      where: the sites of each step; where a dot has both, it has the former.
    """
    program, plan, params = draft.program, draft.program.plan, task.source.params
    graph = program.graph
    divisible = find_divisible(program, where)
    if not divisible:
        return {}
    corrected = plan.recovered_by("bias_correction")
    planned = {tensor.name: tensor for tensor in plan.tensors}
    seen = watch(graph, params, task.alike, divisible)
    products = [product for tensor in divisible.values() for product in tensor.readers]
    stored = [p.site.weight for p in products if p.site.weight is not None]
    weights = fold(graph, params, stored, [])[0]
    found: dict[str, Divided] = {}
    for name, tensor in divisible.items():
        readers = []
        for product, rows in zip(tensor.readers, seen[name].rows, strict=True):
            assert product.site.weight is not None
            weight = product.matrix(np.asarray(weights[product.site.weight]).astype(np.float64))
            trial = Trial(
                inputs=rows,
                weight=weight,
                gains=_gains(program, product.site, planned[name], draft.qparams, len(weight)),
                per_channel=plan.weight_quantize_type == "channel_wise_abs_max",
                centred=product.site.name in corrected,
            )
            readers.append(_Reader(tensor, product, trial))
        equalized = where.get("equalization", frozenset())
        both = all(product.site.name in equalized for product in tensor.readers)
        alphas = ALPHAS["equalization" if both else "smoothquant"]
        best = _choose(planned[name], seen[name], readers, alphas)
        if best is not None:
            found[name] = best._replace(factors=best.factors.reshape(tensor.sizes))
    return found


def _divided(tensor: TensorPlan, divided: Divided) -> TensorPlan:
    """The plan of a tensor that is divided; one whose grid stays keeps its threshold."""
    grid, shape = divided.grid, divided.factors.shape
    threshold = tensor.threshold
    if grid != (tensor.scale, tensor.zero_point):
        threshold = grid.scale * max(128 + grid.zero_point, 127 - grid.zero_point)
    channels = tuple(axis for axis, size in enumerate(shape) if size > 1)
    return dataclasses.replace(tensor, threshold=threshold, channels=channels, **grid._asdict())


class _Reader:
    """A site that reads a tensor, tried with factors for its input channels, flattened [I]."""

    def __init__(self, tensor: Divisible, product: Product, trial: Trial):
        self._trial = trial
        assert product.site.weight is not None
        shape = product.graph.shape(product.site.weight)
        numbers = np.arange(np.prod(tensor.sizes), dtype=np.int64).reshape(tensor.sizes)
        laid = along_weight(product.site, shape, numbers)
        # [G, K], the input channel of each product
        self._channel = product.matrix(np.broadcast_to(laid, shape))[:, :, 0]

    def largest(self, channels: int) -> np.ndarray:
        """[I], the largest |weight| behind each input channel."""
        largest = np.zeros(channels)
        np.maximum.at(largest, self._channel, np.abs(self._trial.weight).max(axis=2))
        return largest

    def error(self, grid: InputGrid, factors: np.ndarray | None) -> float:
        return self._trial.error(grid, None if factors is None else factors[self._channel])


def _gains(
    program: Program, site: Site, tensor: TensorPlan, qparams: Any, groups: int
) -> np.ndarray:
    """[G, O], what the epilogue multiplies a site's output by."""
    scale = np.asarray(layout.get(qparams["params"], program.slots[site.name].scale), np.float64)
    gains = np.asarray(qparams["sites"][site.name]["multiplier"]) / (scale * tensor.scale)
    return gains.reshape(groups, -1)


def _choose(
    tensor: TensorPlan,
    seen: Seen,
    readers: Sequence[_Reader],
    alphas: Sequence[float],
) -> Divided | None:
    """The factors [I] and the grid of least error; None where none is better than none.

    Args:
      tensor: its plan; where it is not symmetric, other zero points are tried too.
      seen: what the float model showed of it.
      readers: the sites behind it.
      alphas: the exponents to try.
    """
    # What wins has to beat the tensor as it is by some margin: the rows are few, and a scale for
    # each channel keeps the tensor out of the calls that know one scale.
    own = Grid(tensor.scale, tensor.zero_point)
    least = _WORTH * sum(reader.error(_input_grid(own), None) for reader in readers)
    largest = np.max([reader.largest(seen.high.shape[1]) for reader in readers], axis=0)
    # A channel whose weights are all zero may be divided by anything that is finite.
    largest = np.where(largest > 0, largest, largest.max(initial=0.0) or 1.0)
    best = None
    for grid in [own] if tensor.symmetric else candidate_grids(own, seen):
        inputs = _input_grid(grid)
        ranges = _ranges(inputs, seen)
        # A step is no larger than the tensor's was, unless the channel reaches further on this side
        most = np.maximum(ranges, own.scale / grid.scale)
        for alpha in alphas:
            factors = ranges**alpha / largest ** (1 - alpha)
            factors = factors * np.max(ranges / factors)  # no channel beyond the grid
            factors = np.clip(factors, SMALLEST_SCALE / grid.scale, most)
            if (found := sum(reader.error(inputs, factors) for reader in readers)) < least:
                best, least = Divided(factors, grid), found
    return best


def _input_grid(grid: Grid) -> InputGrid:
    return InputGrid(grid.scale, -128.0 - grid.zero_point, 127.0 - grid.zero_point)


def candidate_grids(own: Grid, seen: Seen) -> list[Grid]:
    """The tensor's own grid, and those with the zero points that fit its divided channels.

    Each channel divided by its width lies in [-r, 1 - r].  One zero point covers all channels, as
    far as they reach to either side; another is that of the middle channel, for where one that is
    unlike the others (all negative beside a GELU's) would cost them half of their steps.  The scale
    is the one with which the tensor's own range is covered, on the side where that takes more.
    """
    low, high = -seen.low.min(axis=0), seen.high.max(axis=0)
    width = low + high
    below = (low / np.where(width > 0, width, 1.0))[width > 0].astype(np.float64)
    if not below.size:
        return [own]
    middle = float(np.median(below))
    ends = {(float(below.max()), 1 - float(below.min())), (middle, 1 - middle)}
    points = {make_grid(max(end), -end[0], end[1]).zero_point for end in ends} - {own.zero_point}
    there = _input_grid(own)
    grids = [own]
    for zero_point in sorted(points):
        here = _input_grid(Grid(own.scale, zero_point))
        wider = max(
            there.highest / here.highest if here.highest > 0 else 0.0,
            there.lowest / here.lowest if here.lowest < 0 else 0.0,
        )
        grids.append(Grid(own.scale * wider, zero_point))
    return grids


def _ranges(grid: InputGrid, seen: Seen) -> np.ndarray:
    """[I], how much of a grid each channel may take up."""
    shown = np.maximum(
        seen.high / (grid.step * grid.highest) if grid.highest > 0 else 0.0,
        seen.low / (grid.step * grid.lowest) if grid.lowest < 0 else 0.0,
    )
    ranges = np.minimum(reach(shown), 1.0)
    return np.maximum(ranges, _SMALLEST * np.median(ranges))
