"""The arrays of single sites: integers and scales of weights, multipliers and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.sites import Site
from jaxquant.plan import layout, ties
from jaxquant.plan.binding import Binding, Int8Site
from jaxquant.plan.epilogue import stored_shape
from jaxquant.plan.inputs import along_weight
from jaxquant.weights.epilogue import (
    accumulator_terms,
    compose,
    epilogue_arrays,
    sums_by_channel,
    whole_steps,
)
from jaxquant.weights.integers import (
    channels_in_use,
    quantize_weight,
    relative_scales,
    weight_scale,
)

# Tensor, with its layer -> what its channels are divided by.  Where one layer of a tensor is there
# all are, with ones where nothing is divided: their scales are stacked.
Divisors = Mapping[str, np.ndarray]


class Whole(NamedTuple):
    """What the graphs of a model have in common.

    Attributes:
      slots: where the weights of the sites are stored.
      fits: what the multipliers of the sites have to fit.
      divisors: see `quantize_params`.
      uses: how many sites read what is stored in a slot.
    """

    slots: Mapping[str, layout.WeightSlot]
    fits: Mapping[str, ties.Fit]
    divisors: Divisors
    uses: Mapping[layout.WeightSlot, int]


class SiteQuantizer:
    """The arrays of the sites of one graph.

    Args:
      binding: of the graph.
      whole: what all graphs of the model have in common.
      weights, operands: the float weights of the sites, and what their epilogues read.
    """

    def __init__(
        self,
        binding: Binding,
        whole: Whole,
        weights: Mapping[ir.Var, np.ndarray],
        operands: dict[ir.Var, np.ndarray],
    ) -> None:
        self._binding, self._whole = binding, whole
        self._weights, self._operands = weights, operands
        self._scales = {tensor.name: tensor.scale for tensor in binding.plan.tensors}
        self._per_channel = binding.plan.weight_quantize_type == "channel_wise_abs_max"

    def table(self, site: Site) -> tuple[np.ndarray, np.ndarray]:
        """The integers and scales of a table that rows are looked up in."""
        assert site.weight is not None
        table = np.asarray(self._weights[site.weight]).astype(np.float64)
        check_finite(site, table)
        scale = weight_scale(table, site.channel_axes if self._per_channel else ())
        return quantize_weight(table, site.channel_axes, scale), scale

    def weightless(self, int8_site: Int8Site) -> dict[str, Any]:
        """The arrays of a site whose weight, if it has one, is computed in the call."""
        return epilogue_arrays(int8_site, self._operands, self._step(int8_site), None)

    def weighted(
        self, int8_site: Int8Site
    ) -> tuple[tuple[np.ndarray, np.ndarray], dict[str, np.ndarray]]:
        """The integers and scales of a site's weight, and the site's arrays."""
        site, axes, step = int8_site.site, int8_site.site.channel_axes, self._step(int8_site)
        assert site.weight is not None
        weight = once(self._binding.graph, site, np.asarray(self._weights[site.weight]))
        weight = weight.astype(np.float64)
        if not int8_site.dynamic:
            weight = undivided(self._binding, site, weight, self._whole.divisors)
        scale = weight_scale(weight, axes if self._per_channel else ())
        if self._may_grow(int8_site):
            worth = compose(int8_site, self._operands, scale * step, None)[0]
            used = np.abs(worth) * channels_in_use(weight, axes)
            fit = self._whole.fits.get(site.name + layer_suffix(self._binding.layer))
            scale = scale * _growth(used, fit).reshape(scale.shape)
        int8 = quantize_weight(weight, axes, scale)

        others: dict[str, np.ndarray] = {}
        if site.as_contraction.choosing is not None:
            # Each row has the scale of what it chose; the sums keep no zero point.
            largest, others["relative_scale"] = relative_scales(site, weight, scale)
            accumulator, offset = largest * step, None
        else:
            if int8_site.asymmetric:
                others["weight_sum"] = sums_by_channel(int8, axes).astype(np.int32)
            zero_points = {} if int8_site.dynamic else self._binding.zero_points
            zero_point = zero_points.get(site.operands[0], 0)
            accumulator, offset = accumulator_terms(int8, axes, scale * step, zero_point)
            accumulator = accumulator * channels_in_use(weight, axes)

        arrays = epilogue_arrays(int8_site, self._operands, accumulator, offset) | others
        if "bias" in arrays and self._has_planned_steps(int8_site):
            arrays["bias"] = whole_steps(arrays["bias"], arrays["multiplier"])
        return (int8, scale), arrays

    def _step(self, int8_site: Int8Site) -> np.ndarray:
        """What one step of a site's planned operands is worth, multiplied."""
        names = (self._binding.scales[var] for var in int8_site.with_scales)
        return np.asarray(np.prod([self._scales[name] for name in names]))

    def _has_planned_steps(self, int8_site: Int8Site) -> bool:
        """Whether none of its operands is scaled in the call."""
        return len(int8_site.with_scales) == len(int8_site.site.operands)

    def _may_grow(self, int8_site: Int8Site) -> bool:
        """Whether a site's multipliers are its own to change: no other site or layer has them."""
        site = int8_site.site
        assert site.weight is not None
        is_alone = self._whole.uses[self._whole.slots[site.name]] == 1
        is_alone &= all(self._binding.model.varies_by_layer(site.weight))
        chooses = site.as_contraction.choosing is not None
        return self._per_channel and is_alone and not chooses and self._has_planned_steps(int8_site)


def once(graph: ir.Graph, site: Site, weight: np.ndarray) -> np.ndarray:
    """A site's weight, with size 1 along the axes that share it: as it is stored."""
    return weight[tuple(slice(0, size) for size in stored_shape(graph, site))]


def undivided(
    binding: Binding,
    site: Site,
    weight: np.ndarray,
    divisors: Divisors,
) -> np.ndarray:
    """A weight in float64, times what the channels of the site's input are divided by."""
    weight = np.asarray(weight).astype(np.float64)
    name = binding.scales.get(site.operands[0], "") + layer_suffix(binding.layer)
    factors = divisors.get(name)
    if factors is None:
        return weight
    return weight * along_weight(site, weight.shape, factors)


def _growth(multiplier: np.ndarray, fit: ties.Fit | None) -> np.ndarray:
    """By what factor the multipliers of a site grow so that no sum of it comes near a tie: [C]."""
    is_used = (multiplier > 0) & np.isfinite(multiplier)
    used = multiplier[is_used]
    growth = np.ones_like(multiplier)
    if fit is None:
        return growth
    if fit.scale is not None:
        scale = float(np.float32(fit.scale))
        # A larger scale costs a little accuracy, and no sum of it lies halfway between two
        # integers.
        ratio = used / scale if fit.keeps_small else np.maximum(used / scale, ties.LEAST_RATIO)
        growth[is_used] = ties.fractions(ratio) * scale / used
    elif fit.unit is not None:
        growth[is_used] = ties.multiples(used, fit.unit, fit.keeps_small) / used
    return growth


def check_finite(site: Site, table: np.ndarray) -> None:
    """Raise ValueError where the table of an embedding holds infinities, which no integer is."""
    if not np.isfinite(table).all():
        raise ValueError(
            f"the table of site {site.name!r} holds infinities, which have no int8 form: leave it "
            f"in float with skip=({site.name!r},)"
        )
