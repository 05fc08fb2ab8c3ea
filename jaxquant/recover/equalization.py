"""Equalization: a step of its own for each input channel of a site, which the weight takes back.

x · W = (x / e) · (e W) for any e > 0 per input channel.  An int8 tensor that only convolutions and
dots with a stored weight read is divided by e as it is quantized (its scale becomes a vector), and
the weights are multiplied by e before they are quantized.  Nothing is said of the activation before
the tensor, since no parameter in front of it changes: ReLU, ReLU6 and all others are handled alike.
Depthwise and grouped convolutions are too; for a depthwise one e ends in the weight's scales.

"equalization" is the cross-layer equalization of M. Nagel et al., Data-Free Quantization through
Weight Equalization and Bias Correction, 2019, e = r^α / w^(1-α) with α = 1/2, r the channel's range
and w the largest magnitude of its weights.  Other than there, r is of the quantized tensor instead
of the weight before it, and of several α, none included, that of the least expected error is taken.
"smoothquant" is the migration of G. Xiao et al., SmoothQuant, 2023: dots alone, α = 1/2.

The grid of the tensor stays that of the plan; e is such that no channel is clipped below twice
what it showed, unless the plan's threshold clips it there: images that calibration did not see go
beyond a channel's largest value often, beyond the tensor's seldom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.graph.sites import DOT_EQUATIONS, Site
from jaxquant.plan import layout
from jaxquant.plan.epilogue import channel_axes
from jaxquant.plan.inputs import along_weight, input_axes
from jaxquant.plan.plan import Plan, TensorPlan
from jaxquant.quantize.fold import fold
from jaxquant.quantize.weights import Equalization, along_channels, quantize_weight
from jaxquant.run.program import Program

ALPHAS: Mapping[str, tuple[float, ...]] = {
    "equalization": (0.25, 0.5, 0.75, 1.0),
    "smoothquant": (0.5,),
}
_HEADROOM = 2.0  # a channel's range over what calibration showed of it
_SMALLEST = 1 / 64  # of the tensor's range: the least range of a channel


@dataclasses.dataclass(frozen=True)
class Target:
    """An int8 tensor that may be equalized, and the sites that read it."""

    tensor: TensorPlan
    var: ir.Var
    axes: tuple[int, ...]
    readers: tuple[Site, ...]


class ChannelStats(NamedTuple):
    """Of each channel of a tensor, in its rank with size 1 off the channel axes, float32.

    The least and largest value, the sums of x² and of x ≠ 0, and the number of elements.
    """

    low: Any
    high: Any
    square: Any
    active: Any
    count: Any


def find_targets(program: Program, plan: Plan, steps: Sequence[str]) -> dict[str, Target]:
    """Tensor name -> target, for the steps that are asked for.

    Not among them are tensors whose integers are moved, compared or averaged, and inputs of sites
    that share their weight with a site elsewhere.
    """
    graph, binding = program.graph, program.binding
    planned = {tensor.name: tensor for tensor in plan.tensors}
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
        equations = [graph.equations[s.equation] for s in sites]
        axes = {input_axes(s, e) for s, e in zip(sites, equations, strict=True)}
        dots = all(e.name == "dot_general" for e in equations)
        assert all(e.name in DOT_EQUATIONS for e in equations)
        if len(axes) == 1 and ("equalization" in steps or (dots and "smoothquant" in steps)):
            found[name] = Target(planned[name], var, axes.pop(), tuple(sites))
    return found


def equalize(
    program: Program,
    plan: Plan,
    params: Any,
    qparams: Any,
    examples: Sequence[tuple[Any, ...]],
    steps: Sequence[str],
) -> Equalization:
    """The equalization of every tensor that gains by one.

    Args:
      program, plan: of the int8 model.
      params: the float model's.
      qparams: those of the int8 model without equalization; the gains of its sites are read.
      examples: batches of calibration samples.
      steps: "equalization", "smoothquant" or both: then dots have the former.

    Returns:
      Tensor name -> float64 array of the tensor's rank, of size 1 but along its input channels.
    """
    graph = program.graph
    targets = find_targets(program, plan, steps)
    alphas = ALPHAS["equalization" if "equalization" in steps else "smoothquant"]
    stats = measure(graph, params, examples, targets)
    sites = [site for target in targets.values() for site in target.readers]
    folded = fold(graph, params, [s.weight for s in sites if s.weight is not None], [])[0]
    found = {}
    for name, target in targets.items():
        weights = [
            _Reader(graph, site, folded[site.weight], _gains(program, site, target, qparams), plan)
            for site in target.readers
            if site.weight is not None
        ]
        factors = _choose(target, stats[name], weights, alphas)
        if factors is not None:
            found[name] = factors
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


def measure(
    graph: ir.Graph,
    params: Any,
    examples: Sequence[tuple[Any, ...]],
    targets: Mapping[str, Target],
) -> dict[str, ChannelStats]:
    """What the channels of the targets hold in the float model, over all examples."""
    needed = list(ir.walk_back(graph, [t.var for t in targets.values()]))

    @jax.jit
    def run(params: Any, flat: list[Any]) -> dict[str, ChannelStats]:
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
        env = evaluate.evaluate(graph, leaves, flat, equations=needed)
        return {n: _channel_stats(env.read(t.var), t.axes) for n, t in targets.items()}

    total: dict[str, ChannelStats] = {}
    for inputs in examples:
        for name, new in jax.device_get(run(params, jax.tree.leaves(inputs))).items():
            total[name] = _merge(total[name], new) if name in total else new
    return total


def _channel_stats(x: jax.Array, axes: Sequence[int]) -> ChannelStats:
    x = x.astype(jnp.float32)
    rest = tuple(a for a in range(x.ndim) if a not in axes)
    square = jnp.sum(x**2, axis=rest, keepdims=True)
    active = jnp.sum((x != 0).astype(jnp.float32), axis=rest, keepdims=True)
    low = jnp.min(x, axis=rest, keepdims=True, initial=0)
    high = jnp.max(x, axis=rest, keepdims=True, initial=0)
    count = jnp.float32(x.size / max(square.size, 1))
    return ChannelStats(low, high, square, active, count)


def _merge(a: ChannelStats, b: ChannelStats) -> ChannelStats:
    return ChannelStats(
        np.minimum(a.low, b.low),
        np.maximum(a.high, b.high),
        a.square + b.square,
        a.active + b.active,
        a.count + b.count,
    )


class _Reader(NamedTuple):
    """A site behind a target: its weight in float64 and what its output channels are scaled by."""

    graph: ir.Graph
    site: Site
    weight: np.ndarray
    gains: np.ndarray
    plan: Plan

    def along(self, factors: np.ndarray) -> np.ndarray:
        eqn = self.graph.equations[self.site.equation]
        return along_weight(self.site, eqn, self.weight.shape, np.asarray(factors, np.float64))

    def largest(self, factors: np.ndarray) -> np.ndarray:
        """The largest |weight| behind each input channel, in the shape of `factors`."""
        marked = self.along(np.arange(factors.size, dtype=np.float64).reshape(factors.shape))
        index = np.broadcast_to(marked, self.weight.shape).astype(np.int64)
        largest = np.zeros(factors.size)
        np.maximum.at(largest, index.ravel(), np.abs(self.weight).astype(np.float64).ravel())
        return largest.reshape(factors.shape)

    def error(self, factors: np.ndarray, noise: np.ndarray, power: np.ndarray) -> float:
        """The expected square error of the outputs: of the input's rounding and the weight's."""
        eqn = self.graph.equations[self.site.equation]
        axes = channel_axes(self.graph, self.site, eqn)
        weight = np.asarray(self.weight).astype(np.float64)
        scaled = weight * self.along(factors)
        per_channel = self.plan.weight_quantize_type == "channel_wise_abs_max"
        int8, scale = quantize_weight(scaled, axes if per_channel else ())
        off = (scaled - int8 * along_channels(scale, axes, weight.shape)) / self.along(factors)
        terms = weight**2 * self.along(noise) + off**2 * self.along(power)
        return float(np.sum(terms * along_channels(self.gains, axes, weight.shape) ** 2))


def _gains(program: Program, site: Site, target: Target, qparams: Any) -> np.ndarray:
    """[C], what the epilogue multiplies a site's output by."""
    scale = np.asarray(layout.get(qparams["params"], program.slots[site.name].scale), np.float64)
    return np.asarray(qparams["sites"][site.name]["multiplier"]) / (scale * target.tensor.scale)


def _choose(
    target: Target, stats: ChannelStats, readers: Sequence[_Reader], alphas: Sequence[float]
) -> np.ndarray | None:
    """The equalization of least expected error; None where none is better than none."""
    step, zero = target.tensor.scale, target.tensor.zero_point
    lowest, highest = step * ((-128 if zero else -127) - zero), step * (127 - zero)
    shown = np.maximum(
        np.asarray(stats.high, np.float64) / highest if highest > 0 else 0.0,
        np.asarray(stats.low, np.float64) / lowest if lowest < 0 else 0.0,
    )
    ranges = np.clip(_HEADROOM * shown, _SMALLEST, 1.0)
    power = np.asarray(stats.square, np.float64) / max(float(stats.count), 1.0)
    active = np.asarray(stats.active, np.float64) / max(float(stats.count), 1.0)
    largest = np.max([reader.largest(ranges) for reader in readers], axis=0)
    largest = np.where(largest > 0, largest, largest.max(initial=0.0) or 1.0)

    def error(factors: np.ndarray) -> float:
        noise = np.minimum(active * (step * factors) ** 2 / 12, power)
        return sum(reader.error(factors, noise, power) for reader in readers)

    best, least = None, error(np.ones_like(ranges))
    for alpha in alphas:
        factors = ranges**alpha / largest ** (1 - alpha)
        factors = factors * np.max(ranges / factors)  # no channel beyond the grid
        if (found := error(factors)) < least:
            best, least = factors, found
    return best
