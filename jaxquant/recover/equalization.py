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

The grid of the tensor stays that of the plan, and r is not what calibration showed of a channel but
how far its tail may go (`jaxquant.recover.channels.reach`), the tensor's own range at most: images
that calibration did not see exceed a channel's largest value often, the tensor's seldom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.inputs import along_weight, input_axes
from jaxquant.plan.plan import Plan, TensorPlan
from jaxquant.quantize.fold import fold
from jaxquant.quantize.weights import Equalization
from jaxquant.recover.channels import Seen, Target, reach, watch
from jaxquant.recover.product import Product
from jaxquant.recover.trial import InputGrid, Trial
from jaxquant.run.program import Program

ALPHAS: Mapping[str, tuple[float, ...]] = {
    "equalization": (0.25, 0.5, 0.75, 1.0),
    "smoothquant": (0.5,),
}
_WORTH = 0.9  # an equalization is worth it where the error falls to this part
_SMALLEST = 1 / 64  # of the tensor's range: the least range of a channel


def find_targets(program: Program, steps: Sequence[str]) -> dict[str, Target]:
    """Tensor name -> target, for the steps that are asked for.

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
    groups = list(binding.forms.group.values())
    found = {}
    for var, name in binding.names.items():
        sites = readers.get(var, [])
        alone = groups.count(binding.forms.group[var]) == 1
        stored = all(s.name in program.slots and users[program.slots[s.name]] == {var}
                     for s in sites)  # fmt: skip
        decided = any(e.index in binding.decisions for e in graph.consumers.get(var, ()))
        if not (sites and alone and stored) or decided:
            continue
        products = tuple(Product(graph, site) for site in sites)
        axes = {input_axes(p.site, p.equation) for p in products}
        if len(axes) > 1 or any(p.reason for p in products):
            continue
        dots = all(p.equation.name == "dot_general" for p in products)
        if "equalization" in steps or (dots and "smoothquant" in steps):
            found[name] = Target(var, axes.pop(), products)
    return found


def equalize(
    program: Program,
    plan: Plan,
    params: Any,
    qparams: Any,
    examples: Sequence[tuple[Any, ...]],
    steps: Sequence[str],
    only: Collection[str] | None = None,
) -> Equalization:
    """The equalization of every tensor that gains by one.

    Args:
      program, plan: of the int8 model.
      params: the float model's.
      qparams: those of the int8 model without equalization; the gains of its sites are read.
      examples: batches of calibration samples.
      steps: "equalization", "smoothquant" or both: then dots have the former.
      only: the sites whose inputs may be equalized; None for all.

    Returns:
      Tensor name -> float64 array of the tensor's rank, of size 1 but along its input channels.
    """
    graph = program.graph
    targets = find_targets(program, steps)
    if only is not None:
        targets = {
            name: target
            for name, target in targets.items()
            if all(product.site.name in only for product in target.readers)
        }
        if not targets:
            return {}
    alphas = ALPHAS["equalization" if "equalization" in steps else "smoothquant"]
    planned = {tensor.name: tensor for tensor in plan.tensors}
    seen = watch(graph, params, examples, targets)
    products = [product for target in targets.values() for product in target.readers]
    stored = [p.site.weight for p in products if p.site.weight is not None]
    weights = fold(graph, params, stored, [])[0]
    found = {}
    for name, target in targets.items():
        readers = []
        for product, rows in zip(target.readers, seen[name].rows, strict=True):
            assert product.site.weight is not None
            weight = product.matrix(np.asarray(weights[product.site.weight]).astype(np.float64))
            trial = Trial(
                inputs=rows,
                weight=weight,
                gains=_gains(program, product.site, planned[name], qparams, len(weight)),
                per_channel=plan.weight_quantize_type == "channel_wise_abs_max",
                centred="bias_correction" in plan.recover,
            )
            readers.append(_Reader(target, product, trial))
        factors = _choose(planned[name], seen[name], readers, alphas)
        if factors is not None:
            found[name] = factors.reshape(target.sizes)
    return found


def with_channels(plan: Plan, equalization: Equalization) -> Plan:
    """The plan that tells the axes along which scales vary."""
    tensors = [
        dataclasses.replace(t, channels=_varying(equalization[t.name].shape))
        if t.name in equalization
        else t
        for t in plan.tensors
    ]
    return dataclasses.replace(plan, tensors=tuple(tensors))


def _varying(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis, size in enumerate(shape) if size > 1)


class _Reader:
    """A site behind a target, tried with factors for the target's input channels, flattened [I]."""

    def __init__(self, target: Target, product: Product, trial: Trial):
        self._trial = trial
        assert product.site.weight is not None
        shape = product.graph.shape(product.site.weight)
        numbers = np.arange(np.prod(target.sizes), dtype=np.int64).reshape(target.sizes)
        laid = along_weight(product.site, product.equation, shape, numbers)
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
    tensor: TensorPlan, seen: Seen, readers: Sequence[_Reader], alphas: Sequence[float]
) -> np.ndarray | None:
    """The factors [I] of least error; None where none is better than none."""
    step, zero = tensor.scale, tensor.zero_point
    grid = InputGrid(step, -128.0 - zero, 127.0 - zero)
    shown = np.maximum(
        seen.high / (step * grid.highest) if grid.highest > 0 else 0.0,
        seen.low / (step * grid.lowest) if grid.lowest < 0 else 0.0,
    )
    ranges = np.clip(reach(shown), _SMALLEST, 1.0)
    largest = np.max([reader.largest(len(ranges)) for reader in readers], axis=0)
    largest = np.where(largest > 0, largest, largest.max(initial=0.0) or 1.0)
    best, least = None, _WORTH * sum(reader.error(grid, None) for reader in readers)
    for alpha in alphas:
        factors = ranges**alpha / largest ** (1 - alpha)
        factors = factors * np.max(ranges / factors)  # no channel beyond the grid
        factors = np.minimum(factors, 1.0)
        if (found := sum(reader.error(grid, factors) for reader in readers)) < least:
            best, least = factors, found
    return best
