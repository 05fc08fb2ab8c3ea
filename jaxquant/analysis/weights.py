"""How well the weights of an int8 model fit their grids."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.graph.layer_names import of_layer
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.inputs import along_weight, input_axes
from jaxquant.report.sqnr import decibel
from jaxquant.run.layers import GraphLayer
from jaxquant.run.program import Program
from jaxquant.weights.fold import fold
from jaxquant.weights.sites import once


class WeightRanges(NamedTuple):
    """One site's weight.

    Attributes:
      outputs: float64 [C], the largest magnitude of each output channel.
      sqnr_db: of the weight itself, float against int8.
      channel_db: the mean of the output channels' own SQNR in dB, or of the input channels', the
        less of both: a few large weights hide the others from `sqnr_db`.
    """

    outputs: np.ndarray
    sqnr_db: float
    channel_db: float


def weight_ranges(program: Program, params: Any, qparams: Any) -> dict[str, WeightRanges]:
    """Site -> ranges, for the sites with an int8 weight that is stored.

    A site inside a scan over stacked weights has those of each layer, by the name "NAME[3]".
    """
    if not program.mode.integer:
        return {}
    found = {}
    for layer in GraphLayer(program, program.binding, qparams, params).walk():
        graph, slots = layer.program.graph, layer.program.slots
        sites = [each for each in layer.binding.sites if each.site.name in slots]
        stored = [each.site.weight for each in sites if each.site.weight is not None]
        # Folded once a layer: parameters may need BatchNorm or a transpose before they are weights.
        weights = fold(graph, layer.params, stored, [])[0]
        for int8_site in sites:
            site = int8_site.site
            assert site.weight is not None
            weight = once(graph, site, np.asarray(weights[site.weight])).astype(np.float64)
            found[of_layer(site.name, layer.layer)] = _ranges(layer, int8_site, weight)
    return found


def _ranges(layer: GraphLayer, int8_site: Int8Site, weight: np.ndarray) -> WeightRanges:
    site = int8_site.site
    axes = site.channel_axes
    others = tuple(a for a in range(weight.ndim) if a not in axes)
    slot = layer.program.slots[site.name]
    stored, scale = jax.device_get(
        [layout.get(layer.qparams["params"], path) for path in (slot.int8, slot.scale)]
    )
    # The stored form against the float weight, with what equalization divided taken back.
    spread = [weight.shape[a] if a in axes else 1 for a in range(weight.ndim)]
    got = stored * np.float64(scale).reshape(spread if np.ndim(scale) else ())
    if not (int8_site.dynamic or site.is_lookup):
        got = got / _divisors(layer, site, weight.shape)
    # A lookup has rows in place of inputs.
    inputs = others if site.is_lookup else site.weight_axes.contracted
    return WeightRanges(
        outputs=np.abs(weight).max(axis=others, initial=0.0).reshape(-1),
        sqnr_db=decibel(float(np.sum(weight**2)), float(np.sum((weight - got) ** 2))),
        channel_db=min(_mean_db(weight, got, axes), _mean_db(weight, got, inputs)),
    )


def _mean_db(weight: np.ndarray, got: np.ndarray, axes: tuple[int, ...]) -> float:
    """The mean SQNR of the slices along some axes, those that are all zero left out."""
    others = tuple(a for a in range(weight.ndim) if a not in axes)
    signal, noise = (np.sum(x**2, axis=others) for x in (weight, weight - got))
    used = signal > 0
    if not used.any():
        return math.inf
    # A slice that is exact has no noise; the clip below takes care of it.
    ratio = signal[used] / np.maximum(noise[used], np.finfo(np.float64).tiny)
    return float(np.clip(10 * np.log10(ratio), -20, 100).mean())


def _divisors(layer: GraphLayer, site: Site, shape: tuple[int, ...]) -> np.ndarray:
    """What the weight was multiplied by before it was quantized; broadcasts against it."""
    binding = layer.binding
    name = binding.scales.get(site.operands[0])
    tensor = next((t for t in binding.plan.tensors if t.name == name), None)
    if tensor is None or not tensor.channels:
        return np.ones(())
    rank = len(binding.graph.shape(site.operands[0]))
    factors = np.asarray(layer.qparams["tensors"][name]["scale"], np.float64) / tensor.scale

    # As the input has them: shorter factors are of its last axes.
    factors = factors.reshape((1,) * (rank - factors.ndim) + factors.shape)
    assert set(tensor.channels) <= set(input_axes(site))
    return along_weight(site, shape, factors)
