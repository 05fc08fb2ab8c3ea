"""The int8 model's arrays, `qparams`: weights, scales, multipliers and biases of all sites."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.plan import layout, ties
from jaxquant.plan.binding import Binding, BoundBody
from jaxquant.plan.groups import group_layout
from jaxquant.plan.liveness import float_leaves
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan, TensorPlan
from jaxquant.weights.fold import fold, leaves_of_layers
from jaxquant.weights.groups import quantize_groups
from jaxquant.weights.sites import Divisors, SiteQuantizer, Whole, check_finite
from jaxquant.weights.stacked import stack_layers


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
    # Before any weight is rounded: how far a scale may grow depends on who reads the sums.
    fits = ties.find_fits(binding) if MODES[binding.plan.mode].tensor_scales else {}
    whole = Whole(slots, fits, divisors or {}, collections.Counter(slots.values()))
    qparams = _quantize(binding, params, whole)
    _put_float_leaves(qparams["params"], binding, slots, params)
    return jax.device_put(qparams)


def _quantize(binding: Binding, params: Any, whole: Whole) -> dict[str, Any]:
    """The arrays of a model and of its bodies, without the parameters that stay float.

    Args:
      binding: the model, or a layer of a body.
      params: the values of the leaves of its graph, as a pytree.
      whole: what all graphs have in common.
    """
    qparams = _quantize_graph(binding, params, whole)
    for body in (body for bodies in binding.bodies.values() for body in bodies):
        if body.layers[0].holds_int8:
            leaves = leaves_of_layers(body.model, binding.graph, params)
            qparams = layout.joined(qparams, _quantize_body(body, leaves, whole))
    return qparams


def _quantize_body(
    body: BoundBody, leaves: Sequence[Sequence[np.ndarray]], whole: Whole
) -> dict[str, Any]:
    """The arrays of the layers of a body, stacked; `leaves` are those of each layer."""
    layers = [
        _quantize(layer, values, whole) for layer, values in zip(body.layers, leaves, strict=True)
    ]
    if body.model.layers is None:
        return layers[0]
    return stack_layers(layers, body.shared_weights(whole.slots))


def _quantize_graph(binding: Binding, params: Any, whole: Whole) -> dict[str, Any]:
    """The arrays of the sites in a model's own graph."""
    graph, plan, slots = binding.graph, binding.plan, whole.slots
    qparams: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    if not MODES[plan.mode].integer:
        _put_grouped_weights(qparams["params"], graph, binding, slots, params, plan)
        return qparams

    quantizer = SiteQuantizer(
        binding, whole, *fold(graph, params, *_static_tensors(binding, slots))
    )
    for int8_site in binding.sites:
        site, stored = int8_site.site, None
        if site.is_lookup:
            stored = quantizer.table(site)
        elif site.name in slots:
            stored, qparams["sites"][site.name] = quantizer.weighted(int8_site)
        else:
            qparams["sites"][site.name] = quantizer.weightless(int8_site)
        if stored is not None:
            integers, scale = stored
            _put(qparams, slots[site.name], integers, scale.astype(np.float32))
    for tensor in plan.tensors:
        qparams["tensors"][tensor.name] = _tensor_arrays(binding, tensor, whole.divisors)
    return qparams


def _tensor_arrays(binding: Binding, tensor: TensorPlan, divisors: Divisors) -> dict[str, Any]:
    """The grid of a tensor, as programs read it."""
    factors = divisors.get(tensor.name + layer_suffix(binding.layer), np.ones(()))
    scale = tensor.scale * _broadcasting(factors)
    arrays: dict[str, Any] = {"scale": np.float32(scale), "inv_scale": np.float32(1.0 / scale)}
    # One program runs all layers of a scan: what differs between them is an array.
    if binding.model.scans:
        arrays["zero_point"] = np.int32(tensor.zero_point)
    return arrays


def _put(
    qparams: dict[str, Any], slot: layout.WeightSlot, integers: np.ndarray, scale: np.ndarray
) -> None:
    """Set a stored weight."""
    layout.put(qparams["params"], slot.int8, integers)
    layout.put(qparams["params"], slot.scale, scale)


def _broadcasting(factors: np.ndarray) -> np.ndarray:
    """The factors without their leading axes of size 1."""
    shape = factors.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    return factors.reshape(shape)


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
        check_finite(site, np.asarray(weights[views[slots[site.name]].var]))
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
