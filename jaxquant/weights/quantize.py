"""The int8 model's arrays: weights, scales, multipliers and biases.

Weights are symmetric int8: [-127, 127], scale = threshold / 127, round half to even.  The threshold
is the largest |w| of a channel, or of the weight; a little more where that keeps the site's sums
away from ties (`jaxquant.plan.ties`).  A channel that is all zero has scale 1, and no scale is
below the least float32 that programs compute with: XLA takes smaller ones for zero.  The arithmetic
is float64 on the host; the results are float32.
"""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix
from jaxquant.graph.sites import Site
from jaxquant.plan import layout, ties
from jaxquant.plan.bind import Binding, BoundBody, Int8Site
from jaxquant.plan.epilogue import stored_shape
from jaxquant.plan.grid import SMALLEST_SCALE
from jaxquant.plan.groups import group_layout
from jaxquant.plan.inputs import along_weight
from jaxquant.plan.liveness import float_leaves
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan
from jaxquant.weights.fold import channel_vector, fold, leaves_of_layers
from jaxquant.weights.groups import quantize_groups

LARGEST_BIAS = 2.0**30  # of a bias in int32, in units of the accumulator: sums need room beside it
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


def stack_layers(
    layers: Sequence[Mapping[str, Any]], shared: Collection[tuple[str, ...]]
) -> dict[str, Any]:
    """The arrays of several layers along a leading axis.

    Args:
      layers: nested dicts; a bias that some layers lack is zero there.
      shared: the paths of arrays that all layers have in common, of which there is one.
    """
    flat = [dict(_flat(layer)) for layer in layers]
    found: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    for path, example in {path: x for each in flat for path, x in each.items()}.items():
        if path in shared:
            layout.put(found, path, example)
            continue
        there = [each.get(path, np.zeros_like(example)) for each in flat]
        layout.put(found, path, np.stack(there))
    return found


def _flat(tree: Mapping[str, Any], head: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*head, key))
        else:
            yield (*head, key), value


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
    for int8_site in binding.sites:
        site = int8_site.site
        planned = [v for v in site.operands if v in binding.scales]  # not those scaled in the call
        accumulator = np.asarray(np.prod([scales[binding.scales[v]] for v in planned]))
        offset, others = None, {}
        if site.name in slots:
            assert site.weight is not None
            axes = site.channel_axes
            per_channel = plan.weight_quantize_type == "channel_wise_abs_max"
            weight = once(graph, site, weights[site.weight])
            weight = undivided(binding, site, weight, divisors)
            int8, scale = quantize_weight(weight, axes if per_channel else ())
            alone = uses[slots[site.name]] == 1 and all(binding.model.varies_by_layer(site.weight))
            chooses = site.as_contraction.choosing is not None
            if per_channel and alone and not chooses and len(planned) == len(site.operands):
                worth = _compose(graph, int8_site, operands, scale * accumulator, None)[0]
                used = np.abs(worth) * channels_in_use(weight, axes)
                growth = _growth(used, fits.get(site.name + layer_suffix(binding.layer)))
                int8, scale = quantize_weight(weight, axes, growth)
            layout.put(qparams["params"], slots[site.name].int8, int8)
            layout.put(qparams["params"], slots[site.name].scale, scale.astype(np.float32))
            zero_point = binding.zero_points.get(site.operands[0], 0)
            if chooses:  # each row has the scale of what it chose; the sums keep no zero point
                largest, others["relative_scale"] = relative_scales(site, weight, scale)
                accumulator = largest * accumulator
            else:
                accumulator, offset = accumulator_terms(int8, axes, scale * accumulator, zero_point)
                accumulator = accumulator * channels_in_use(weight, axes)
        arrays = epilogue_arrays(graph, int8_site, operands, accumulator, offset) | others
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
    """Without the leading axes of size 1."""
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
        ratio = used / scale if fit.keeps_small else np.maximum(used / scale, ties.LEAST_RATIO)
        growth[is_used] = ties.fractions(ratio) * scale / used
    elif fit.unit is not None:
        growth[is_used] = ties.multiples(used, fit.unit, fit.keeps_small) / used
    return growth


def quantize_weight(
    weight: np.ndarray, axes: Sequence[int], growth: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight with one scale for every index along `axes` (none: one for all of it).

    Args:
      weight: floats of any shape.
      axes: of the output channels, or none.
      growth: [C], by what factor a scale is larger than the largest |w| / 127; None for 1.

    Returns:
      The int8 weight and its float64 scale, [C] with C the product of the sizes of `axes`, or [].

    Example:
      >>> int8, scale = quantize_weight(np.array([[1.0, 0.0], [-0.5, 0.0]]), axes=(1,))
      >>> int8.tolist(), (scale * 127).tolist()
      ([[127, 0], [-64, 0]], [1.0, 127.0])
    """
    weight = np.asarray(weight).astype(np.float64)
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = np.abs(weight).max(axis=summed, keepdims=True, initial=0.0)
    scale = np.where(threshold > 0, np.maximum(threshold / 127.0, SMALLEST_SCALE), 1.0)
    if growth is not None:
        scale = scale * growth.reshape(scale.shape)
    int8 = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    return int8, scale.reshape(-1) if axes else scale.reshape(())


def along_channels(values: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """[C] or [], in the order of a weight's channels, so that it broadcasts against the weight.

    Args:
      values: one for each output channel, or one for all.
      axes: of the weight, along its output channels.
      shape: the weight's.
    """
    if values.ndim == 0:
        return values
    return values.reshape([shape[a] if a in axes else 1 for a in range(len(shape))])


def relative_scales(
    site: Site, weight: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scales of a weight that rows choose from: the largest of each channel, and parts of it.

    Args:
      site: a ragged dot with a stored weight.
      weight: its weight.
      scale: [C] or [], of the weight's channels.

    Returns:
      [C'], for each channel of the result the largest scale of all that may be chosen; and float32
      [C], each scale as a part of that, 0 where all of a channel is zero.
    """
    kept, chosen = site.channel_axes, site.weight_axes.chosen
    used = channels_in_use(weight, kept)
    shape = [weight.shape[axis] for axis in kept]
    each = np.where(used, np.broadcast_to(scale, used.shape), 0.0).reshape(shape)
    largest = each.max(axis=tuple(kept.index(axis) for axis in chosen), keepdims=True)
    relative = each / np.where(largest > 0, largest, 1.0)
    return largest.reshape(-1), relative.reshape(-1).astype(np.float32)


def accumulator_terms(
    int8: np.ndarray, axes: Sequence[int], unit: np.ndarray, zero_point: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """What one unit of a site's accumulator is worth, and what its input's zero point adds to it.

    Args:
      int8: the weight.
      axes: of it, along the output channels.
      unit: the product of the scales, [C] or [].
      zero_point: of the input.

    Returns:
      [C]; and [C] or None.
    """
    summed = tuple(a for a in range(int8.ndim) if a not in axes)
    sums = int8.sum(axis=summed, dtype=np.int64).reshape(-1)
    return np.broadcast_to(unit, sums.shape), zero_point * sums if zero_point else None


def channels_in_use(weight: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """bool [C], False where all of a channel is zero before it is rounded."""
    return weight.any(axis=tuple(a for a in range(weight.ndim) if a not in axes)).reshape(-1)


@np.errstate(over="ignore")  # refused at the end
def epilogue_arrays(
    graph: ir.Graph,
    int8_site: Int8Site,
    operands: dict[ir.Var, np.ndarray],
    scale: np.ndarray,
    offset: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Compose the affine chain into one multiplier and bias, in float32.

    Args:
      graph, int8_site: the site.
      operands: the values of the chain's operands.
      scale: [C] or [], what one unit of the accumulator is worth.
      offset: [C], what the accumulator holds too much; None for nothing.

    Raises:
      ValueError: the chain's parameters are not finite.
    """
    multiplier, bias = _compose(graph, int8_site, operands, scale, offset)
    with np.errstate(over="ignore"):
        arrays = {"multiplier": multiplier.astype(np.float32)}
        if bias is not None:
            arrays["bias"] = bias.astype(np.float32)
    if np.isfinite(multiplier).all() and not np.isfinite(arrays["multiplier"]).all():
        raise ValueError(
            f"site {int8_site.site.name!r}: one step of its sums, the product of the steps of what "
            f"it multiplies, is {np.abs(multiplier).max():.3g}, which is beyond float32 "
            f"({np.finfo(np.float32).max:.3g}); scale its input or its weight, or leave it in "
            "float (skip)"
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(
            f"site {int8_site.site.name!r}: the bias or normalisation behind it gives NaN or "
            "infinity; check those parameters"
        )
    return arrays


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _compose(
    graph: ir.Graph,
    int8_site: Int8Site,
    operands: dict[ir.Var, np.ndarray],
    scale: np.ndarray,
    offset: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """`epilogue_arrays` in float64: the multiplier, and the bias or None."""
    multiplier, has_bias = np.asarray(scale, np.float64), offset is not None
    bias = np.zeros_like(multiplier) if offset is None else -offset * multiplier
    for step in int8_site.epilogue.steps:
        if step.op == "neg":
            multiplier, bias = -multiplier, -bias
            continue
        operand = channel_vector(graph, step, operands)
        if step.op == "mul":
            multiplier, bias = multiplier * operand, bias * operand
        elif step.op == "div":
            multiplier, bias = multiplier / operand, bias / operand
        else:
            has_bias = True
            if step.op == "rsub":
                multiplier, bias = -multiplier, -bias
            bias = bias - operand if step.op == "sub" else bias + operand
    return (
        np.broadcast_to(multiplier, scale.shape),
        np.broadcast_to(bias, scale.shape) if has_bias else None,
    )


def whole_steps(bias: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """A bias rounded to whole units of the accumulator, so that int32 holds it as it is.

    Half a unit is next to nothing, but runtimes that add the bias in int32 (ONNX Runtime, TFLite)
    round every output alike only if what they add is the same.  A bias that int32 does not hold
    beside the sums, or that nothing is added to, stays as it is.

    Args:
      bias: float [C] or [].
      multiplier: likewise, what one unit of the accumulator is worth.

    Example:
      >>> whole_steps(np.float32([0.3, 7.0]), np.float32([0.25, 0.0])).tolist()
      [0.25, 7.0]
    """
    unit = np.asarray(multiplier, np.float64)
    steps = np.rint(np.divide(bias, unit, out=np.full(np.shape(bias), np.inf), where=unit != 0))
    fits = np.abs(steps) <= LARGEST_BIAS
    return np.where(fits, np.where(fits, steps, 0) * unit, bias).astype(np.float32)


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
    for slot, view in views.items():
        weight = weights[view.var][tuple(slice(0, size) for size in view.shape)]
        groups = group_layout(view.shape, view.channels, plan.group_size)
        integers, scale = quantize_groups(weight, groups, slot.weight_bits)
        layout.put(tree, slot.int8, integers)
        layout.put(tree, slot.scale, scale.astype(np.float32))


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
