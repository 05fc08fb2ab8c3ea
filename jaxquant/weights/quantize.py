"""The int8 model's arrays, `qparams`: weights, scales, multipliers and biases of all sites."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.sites import Site
from jaxquant.plan import layout, ties
from jaxquant.plan.binding import Binding, BoundBody
from jaxquant.plan.epilogue import stored_shape
from jaxquant.plan.groups import group_layout
from jaxquant.plan.inputs import along_weight
from jaxquant.plan.liveness import float_leaves
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan
from jaxquant.weights.epilogue import (
    accumulator_terms,
    compose,
    epilogue_arrays,
    sums_by_channel,
    whole_steps,
)
from jaxquant.weights.fold import fold, leaves_of_layers
from jaxquant.weights.groups import quantize_groups
from jaxquant.weights.integers import (
    channels_in_use,
    quantize_weight,
    relative_scales,
    weight_scale,
)
from jaxquant.weights.stacked import stack_layers

# Tensor, with its layer -> what its channels are divided by.  Where one layer of a tensor is there
# all are, with ones where nothing is divided: their scales are stacked.
Divisors = Mapping[str, np.ndarray]


def quantize_params(
    binding: Binding, params: Any, divisors: Divisors | None = None
) -> dict[str, Any]:
    """Make `qparams`; see `jaxquant.plan.layout` for its structure.

    Args:
      binding: the model and what becomes int8 of it.
      params: its parameters.
      divisors: what the channels of tensors are divided by before they are quantized, which the
        weights behind them are multiplied by; arrays of the rank of their tensors.
    """
    slots = binding.weight_slots(params)
    fits = ties.find_fits(binding) if MODES[binding.plan.mode].tensor_scales else {}
    qparams = _quantize(binding, params, slots, fits, divisors or {})
    _put_float_leaves(qparams["params"], binding, slots, params)
    return jax.device_put(qparams)


def _quantize(
    binding: Binding,
    params: Any,
    slots: Mapping[str, layout.WeightSlot],
    fits: Mapping[str, ties.Fit],
    divisors: Divisors,
) -> dict[str, Any]:
    """The arrays of a model and of its bodies, without the parameters that stay float.

    Args:
      binding: the model, or a layer of a body.
      params: the values of the leaves of its graph, as a pytree.
      slots, fits: of the whole model.
      divisors: see `quantize_params`.
    """
    qparams = _quantize_graph(binding, params, slots, fits, divisors)
    for body in (body for bodies in binding.bodies.values() for body in bodies):
        if body.layers[0].holds_int8:
            leaves = leaves_of_layers(body.model, binding.graph, params)
            inside = _quantize_body(body, leaves, slots, fits, divisors)
            qparams = layout.joined(qparams, inside)
    return qparams


def _quantize_body(
    body: BoundBody,
    leaves: Sequence[Sequence[np.ndarray]],
    slots: Mapping[str, layout.WeightSlot],
    fits: Mapping[str, ties.Fit],
    divisors: Divisors,
) -> dict[str, Any]:
    """The arrays of the layers of a body, stacked.

    Args:
      body: the body of a loop or choice.
      leaves: the values of its leaves in each layer.
      slots, fits: of the whole model.
      divisors: see `quantize_params`.
    """
    layers = [
        _quantize(layer, values, slots, fits, divisors)
        for layer, values in zip(body.layers, leaves, strict=True)
    ]
    if body.model.layers is None:
        return layers[0]
    return stack_layers(layers, body.shared_weights(slots))


def _quantize_graph(
    binding: Binding,
    params: Any,
    slots: Mapping[str, layout.WeightSlot],
    fits: Mapping[str, ties.Fit],
    divisors: Divisors,
) -> dict[str, Any]:
    """The arrays of the sites in a model's own graph."""
    graph, plan = binding.graph, binding.plan
    qparams: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    if not MODES[plan.mode].integer:
        _put_grouped_weights(qparams["params"], graph, binding, slots, params, plan)
        return qparams
    weights, operands = fold(graph, params, *_static_tensors(binding, slots))
    scales = {tensor.name: tensor.scale for tensor in plan.tensors}
    uses = collections.Counter(slots.values())
    per_channel = plan.weight_quantize_type == "channel_wise_abs_max"
    for int8_site in binding.sites:
        site = int8_site.site
        if site.is_lookup:
            assert site.weight is not None
            table = np.asarray(weights[site.weight]).astype(np.float64)
            _check_finite(site, table)
            scale = weight_scale(table, site.channel_axes if per_channel else ())
            _put(qparams, slots[site.name], quantize_weight(table, site.channel_axes, scale), scale)
            continue
        planned = int8_site.with_scales
        accumulator = np.asarray(np.prod([scales[binding.scales[v]] for v in planned]))
        offset, others = None, {}
        if site.name in slots:
            assert site.weight is not None
            axes = site.channel_axes
            weight = once(graph, site, np.asarray(weights[site.weight])).astype(np.float64)
            if not int8_site.dynamic:
                weight = undivided(binding, site, weight, divisors)
            scale = weight_scale(weight, axes if per_channel else ())
            alone = uses[slots[site.name]] == 1 and all(binding.model.varies_by_layer(site.weight))
            chooses = site.as_contraction.choosing is not None
            if per_channel and alone and not chooses and len(planned) == len(site.operands):
                worth = compose(int8_site, operands, scale * accumulator, None)[0]
                used = np.abs(worth) * channels_in_use(weight, axes)
                growth = _growth(used, fits.get(site.name + layer_suffix(binding.layer)))
                scale = scale * growth.reshape(scale.shape)
            int8 = quantize_weight(weight, axes, scale)
            _put(qparams, slots[site.name], int8, scale)
            zero_point = 0 if int8_site.dynamic else binding.zero_points.get(site.operands[0], 0)
            if chooses:  # each row has the scale of what it chose; the sums keep no zero point
                largest, others["relative_scale"] = relative_scales(site, weight, scale)
                accumulator = largest * accumulator
            else:
                if int8_site.asymmetric:
                    others["weight_sum"] = sums_by_channel(int8, axes).astype(np.int32)
                accumulator, offset = accumulator_terms(int8, axes, scale * accumulator, zero_point)
                accumulator = accumulator * channels_in_use(weight, axes)
        arrays = epilogue_arrays(int8_site, operands, accumulator, offset) | others
        if "bias" in arrays and site.name in slots and len(planned) == len(site.operands):
            arrays["bias"] = whole_steps(arrays["bias"], arrays["multiplier"])
        qparams["sites"][site.name] = arrays
    for tensor in plan.tensors:
        factors = divisors.get(tensor.name + layer_suffix(binding.layer), np.ones(()))
        scale = tensor.scale * _broadcasting(factors)
        qparams["tensors"][tensor.name] = {
            "scale": np.float32(scale),
            "inv_scale": np.float32(1.0 / scale),
        }
        if binding.model.scans:
            qparams["tensors"][tensor.name]["zero_point"] = np.int32(tensor.zero_point)
    return qparams


def _check_finite(site: Site, table: np.ndarray) -> None:
    """Raise ValueError where the table of an embedding holds infinities, which no integer is."""
    if not np.isfinite(table).all():
        raise ValueError(
            f"the table of site {site.name!r} holds infinities, which have no int8 form: leave it "
            f"in float with skip=({site.name!r},)"
        )


def _put(
    qparams: dict[str, Any], slot: layout.WeightSlot, integers: np.ndarray, scale: np.ndarray
) -> None:
    """Set a stored weight."""
    layout.put(qparams["params"], slot.int8, integers)
    is_exponent = scale.dtype == np.uint8
    layout.put(qparams["params"], slot.scale, scale if is_exponent else scale.astype(np.float32))


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


def _broadcasting(factors: np.ndarray) -> np.ndarray:
    """The factors without their leading axes of size 1."""
    shape = factors.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    return factors.reshape(shape)


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


def _static_tensors(
    binding: Binding, slots: Mapping[str, layout.WeightSlot]
) -> tuple[list[ir.Var], list[ir.Var]]:
    """The stored weights of the sites, and the operands of their epilogues."""
    sites = [s.site for s in binding.sites if s.site.name in slots]
    weights = [site.weight for site in sites if site.weight is not None]
    steps = [step for s in binding.sites for step in s.epilogue.steps]
    return weights, [step.operand for step in steps if isinstance(step.operand, int)]


def _put_grouped_weights(
    tree: dict[str, Any],
    graph: ir.Graph,
    binding: Binding,
    slots: Mapping[str, layout.WeightSlot],
    params: Any,
    plan: Plan,
) -> None:
    """The weights of weight-only quantization: integers and their scales by groups."""
    views = {
        slots[s.site.name]: layout.weight_view(graph, s.site, integer=False) for s in binding.sites
    }
    weights, _ = fold(graph, params, [view.var for view in views.values()], [])
    for site in (each.site for each in binding.sites if each.site.is_lookup):
        _check_finite(site, np.asarray(weights[views[slots[site.name]].var]))
    for slot, view in views.items():
        # Copies along an axis are stored once.
        weight = weights[view.var][tuple(slice(0, size) for size in view.shape)]
        groups = group_layout(view.shape, view.channels, plan.group_size)
        integers, scale = quantize_groups(weight, groups, *slot.format)
        _put({"params": tree}, slot, integers, scale)


def _put_float_leaves(
    tree: dict[str, Any],
    binding: Binding,
    slots: Mapping[str, layout.WeightSlot],
    params: Any,
) -> None:
    graph = binding.graph
    paths = layout.leaf_paths(graph, params)
    leaves = dict(zip(graph.leaves, jax.tree.leaves(params), strict=True))
    for var, path in layout.float_paths(float_leaves(binding), paths, slots).items():
        layout.put(tree, path, leaves[var])
