"""Scales with which no sum comes near the middle between two integers.

What is quantized is round(n * r): n, the int32 sum, is exact everywhere, but the ratio r of the
site's multiplier to the scale, and the product, are float32, and XLA, the native kernels, ONNX
Runtime and OpenVINO round them in different orders.  Where n * r is within such an error of k + 1/2
they give different integers.  Among some million activations a few are there, and a deep network
makes much of one.  So multipliers and scales are chosen such that next to none is:

- Sums that are quantized as they are: r = p / q with q odd.  2 n p = (2 k + 1) q has no solution,
  since one side is even and the other is odd, so n * r is at least 1 / (2 q) away from k + 1/2.
- Sums that are added before (to a residual), or quantized on several scales: every multiplier is a
  multiple of one power of two, the unit, so that float32 adds them without an error, in any order;
  a scale is an odd multiple t of the unit.  By the same argument the quotient is at least 1 / (2 t)
  away from k + 1/2; t is below 2^15, and two roundings of a number below 128 less than 2^-16 off.

A multiplier is made larger, never smaller, by way of the weight's scale.  In the first case by less
than 2^-11 of it where a q below 4096 gives that, or r is small (then q is 1 / r, and the distance
r / 2).  In the second to the next multiple: where the rounding of the weights is not small beside a
scale, r is so large that this is some percent.

A channel whose multiplier is far below the scale gives next to nothing but its bias, a number that
comes back in every position of every sample: if it is near a tie, all of them are.  Its multiplier
becomes a whole unit, or 2^-15 of the scale, however much that is more: what its weights lose is
some hundredths of an integer.  They are kept only where somebody else reads its float values, a
float operation or the caller, or where a part of the sums is quantized on a scale far below: a
multiplier below two units takes a multiple of half, a quarter, ... of the unit and grows by half
of itself at most; there a tie is possible.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan import additions
from jaxquant.plan.binding import Binding
from jaxquant.plan.plan import LITERT, TensorPlan
from jaxquant.plan.sums import ScaledGraph, SumScales, find_sums, hands_on

EXCESS = 2.0**-11  # by what part of it a multiplier may grow to be a fraction
LARGEST_DENOMINATOR = 4096  # beyond which no smaller excess is looked for
LARGEST_STEP = 2.0**-6  # by what part of it a scale may change to be an odd multiple
_NUMERATORS = 16  # tried at a time
_LARGEST_RATIO = 64.0  # beyond which a ratio stays: one more in the sum is so many integers
_BITS = 14  # of the multiple that the largest scale is of the unit, less one
_FEWEST = 2  # units in a multiplier whose float values are read
LEAST_RATIO = 2.0**-15  # of a multiplier to a scale where they are not
_UNLIKE = 8.0  # times another scale: the hundredths of an integer are tenths there


class Fit(NamedTuple):
    """What a site's multipliers have to fit: the scale that its sums are quantized on, or a unit.

    Attributes:
      scale: what the sums are quantized on by themselves, or None.
      unit: what their multipliers are multiples of, or None.
      tensors: the names of the scales that are multiples of that unit; none beside a scale.
      keeps_small: whether a channel far below the scales matters: a float operation or the caller
        reads it, or a part of the sums is quantized on a scale far below the others.
    """

    scale: float | None
    unit: float | None
    tensors: frozenset[str]
    keeps_small: bool


def without_ties(binding: Binding) -> Binding:
    """A plan with scales that are odd multiples of a unit where sums are quantized together."""
    plan = binding.whole_plan
    # With one scale for a weight the multipliers of channels cannot be chosen one by one.
    if plan.weight_quantize_type != "channel_wise_abs_max" or not plan.tensors:
        return binding
    scales: dict[str, float] = {}
    planned = {tensor.name: tensor.scale for tensor in plan.tensors}
    for fit in find_fits(binding).values():
        for name in fit.tensors:
            assert fit.unit is not None
            # Far below the unit the nearest odd multiple is far away, and stays as it is.
            if planned[name] * LARGEST_STEP >= fit.unit:
                scales[name] = odd_multiple(planned[name], fit.unit)
    scales |= _of_additions(binding, planned)

    # Scales are stored with each layer's part of the plan, the bodies' too.
    def changed(bound: Binding) -> Binding:
        suffix = layer_suffix(bound.layer)
        tensors = [
            _with_scale(t, scales.get(t.family + suffix, t.scale)) for t in bound.plan.tensors
        ]
        return bound.with_tensors(tensors).in_bodies(changed)

    return changed(binding)


def _of_additions(binding: Binding, planned: Mapping[str, float]) -> dict[str, float]:
    """The scales that additions of int8 tensors read and give, where LiteRT does them."""
    scales: dict[str, float] = {}
    if binding.plan.target != LITERT:
        return scales
    for part in binding.all_layers():
        suffix = layer_suffix(part.layer)
        for group in additions.added_scales(part):
            names = [name + suffix for name in group]
            unit = additions.unit_of(max(planned[name] for name in names))
            for name in names:
                # Far below the unit an odd multiple would be much coarser: such a one is left
                # alone.
                if planned[name] * LARGEST_STEP >= unit:
                    scales[name] = odd_multiple(planned[name], unit)
    return scales


def _with_scale(tensor: TensorPlan, scale: float) -> TensorPlan:
    # The threshold moves with the scale, so that the grid keeps its steps.
    threshold = tensor.threshold * (scale / tensor.scale)
    return dataclasses.replace(tensor, threshold=threshold, scale=scale)


def find_fits(binding: Binding) -> dict[str, Fit]:
    """What the multipliers of the sites have to fit, by the names of the sites.

    There is none for a site without a stored weight, one whose result is not quantized, and one
    that meets a tensor with a scale for each channel.  The name of a site in a layer of a scan ends
    in its number, and so do those of scales.

    Args:
      binding: of a whole model.
    """
    whole = ScaledGraph.of(binding)
    sums = find_sums(whole)
    pairs = list(_pairs(binding, whole))
    # A tensor that is divided by factors for its channels has no single step.
    divided: set[str] = set()
    scales: dict[str, float] = {}
    for bound, scaled in pairs:
        divided |= {name for var, name in scaled.scales.items() if var in bound.per_channel}
        suffix = layer_suffix(bound.layer)

        # All-zero tensors have a scale of 1 that says nothing.
        scales |= {t.name + suffix: t.scale for t in bound.plan.tensors if t.threshold > 0}
    read = frozenset[str]().union(
        *(_read_in_float(bound, scaled, sums[scaled], scaled is whole) for bound, scaled in pairs)
    )
    fits = {}
    for bound, scaled in pairs:
        for int8_site in bound.sites:
            site, found = int8_site.site, sums[scaled].get(int8_site.epilogue.output)
            if found is None or site.stored_weight is None:
                continue
            # On a scale for each channel the ratio is another one for each.
            if not divided.isdisjoint(found.together):
                continue
            # One scale alone: the multiplier is to be a fraction of it. Several: all are odd
            # multiples of one unit, and the multiplier a multiple of that.
            alone, together = found.alone & set(scales), found.together & set(scales)
            keeps_small = not read.isdisjoint(found.together) or _are_unlike(scales, together)
            name = site.name + layer_suffix(bound.layer)
            if len(alone) == 1:
                (scale,) = alone
                fits[name] = Fit(scales[scale], None, frozenset(), keeps_small)
            elif together:
                unit = unit_of(max(scales[each] for each in together))
                fits[name] = Fit(None, unit, together, keeps_small)
    return fits


def _pairs(binding: Binding, scaled: ScaledGraph) -> Iterator[tuple[Binding, ScaledGraph]]:
    """A graph and those of its bodies, each with its binding."""
    yield binding, scaled
    for index, bodies in scaled.bodies.items():
        for (_, layers), body in zip(bodies, binding.bodies[index], strict=True):
            for inner, layer in zip(layers, body.layers, strict=True):
                yield from _pairs(layer, inner)


def _are_unlike(scales: Mapping[str, float], names: frozenset[str]) -> bool:
    """True where next to nothing on one of these scales is much on another."""
    some = [scales[name] for name in names]
    return max(some, default=1.0) > _UNLIKE * min(some, default=1.0)


def _read_in_float(
    binding: Binding, scaled: ScaledGraph, sums: Mapping[ir.Var, SumScales], is_whole: bool
) -> frozenset[str]:
    """The scales of those sums that a float operation or the caller reads in float too."""
    graph, forms = binding.graph, binding.forms
    in_int8 = {each.site.equation for each in binding.sites if not each.dynamic}
    in_int8 |= forms.moves | forms.reads_int8

    def reads_float(eqn: ir.Equation, var: ir.Var) -> bool:
        # A moved or added value is judged where it is quantized in the end.
        if hands_on(scaled, eqn) and any(output in sums for output in eqn.outputs):
            return False
        return eqn.index not in in_int8 or var not in forms.int8

    return frozenset(
        name
        for var, found in sums.items()
        if (is_whole and var in graph.outputs)
        or any(reads_float(eqn, var) for eqn in graph.consumers.get(var, ()))
        for name in found.together
    )


def unit_of(largest: float) -> float:
    """The power of two whose odd multiples are the scales, of which this is the largest."""
    return 2.0 ** (math.floor(math.log2(largest)) - _BITS)


def odd_multiple(scale: float, unit: float) -> float:
    """The odd multiple of `unit` that is nearest to `scale`.

    Example:
      >>> odd_multiple(0.7, 0.125), unit_of(odd_multiple(0.7, unit_of(0.7))) == unit_of(0.7)
      (0.625, True)
    """
    # Rounded down to an odd number: floor of the half, doubled, and one.
    return (2 * math.floor(scale / unit / 2) + 1) * unit


def fractions(ratio: np.ndarray) -> np.ndarray:
    """The first p / q, q odd, that is not below and at most `EXCESS` above; else the nearest.

    A ratio beyond 64 stays as it is.

    Args:
      ratio: float64 [C], positive.

    Example:
      >>> (fractions(np.array([1 / 3, 0.25])) * np.array([3, 2051])).round(9).tolist()
      [1.0, 513.0]
    """
    found = np.full(ratio.shape, np.inf)
    is_open = ratio <= _LARGEST_RATIO
    first = 1
    # Numerators in blocks, from small ones on: most channels find theirs among the first.
    while is_open.any():
        # Open channels only, of which few are left after the first block.
        some, nearest = ratio[is_open], found[is_open]
        for p in range(first, first + _NUMERATORS):
            # The largest denominator that keeps p / q above the ratio, made odd.
            most = np.floor(p / some)
            odd = np.maximum(most - (most % 2 == 0), 1)
            better = (most >= 1) & (nearest > some * (1 + EXCESS)) & (p / odd < nearest)
            nearest = np.where(better, p / odd, nearest)
        found[is_open] = nearest
        first += _NUMERATORS
        is_open &= (found > ratio * (1 + EXCESS)) & (first <= LARGEST_DENOMINATOR * ratio)
    return np.where(np.isfinite(found), found, ratio)


def multiples(multiplier: np.ndarray, unit: float, keeps_small: bool) -> np.ndarray:
    """The least multiples of `unit` that are not below.

    Args:
      multiplier: float64 [C], positive.
      unit: a power of two.
      keeps_small: take multiples of the unit's half, quarter, ... for a multiplier below two units.

    Example:
      >>> multiples(np.array([4.1, 2.0, 1.1, 0.1]), 1.0, True).tolist()
      [5.0, 2.0, 1.5, 0.125]
      >>> multiples(np.array([4.1, 2.0, 1.1, 0.1]), 1.0, False).tolist()
      [5.0, 2.0, 2.0, 1.0]
    """
    step = np.full(multiplier.shape, unit)
    if keeps_small:
        # As many halvings as bring it to two steps.
        step *= np.exp2(np.minimum(np.floor(np.log2(multiplier / unit / _FEWEST)), 0.0))
    # A hair less, so that what rounding brought above a multiple does not take the next one.
    return np.ceil(multiplier / step * (1 - 2.0**-23)) * step
