"""The accumulating int8 sites: their operands dequantized, their epilogue folded."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from jaxquant.deploy.network import Int8Node
from jaxquant.deploy.onnx import contraction, elementwise, reduction
from jaxquant.deploy.onnx.builder import NotCovered, Size, Value, straight
from jaxquant.deploy.onnx.quantization import Weight, make_weight

if TYPE_CHECKING:
    from jaxquant.deploy.onnx.emitter import Emitter


def emit_site(e: Emitter, site: Int8Node) -> Value:
    """The float result of a site, at the end of its epilogue."""
    operands = [e.dequantized(var) for var in site.operands]
    if site.weight or site.computed_weight is not None:
        return _weighted(e, site, operands[0])
    node, shape = site.node, e.shape(site.node.outputs[0])
    if node.op == "dot_general":
        values = operands * 2 if len(operands) == 1 else operands
        form = contraction.dot_form(node, (values[0].rank, values[1].rank))
        value = contraction.dot(e.builder, form, values, shape)
    elif node.op in reduction.OPERATIONS:
        value = reduction.emit(e.builder, node, operands[0], shape)
    else:
        raise NotCovered(f"the operation {node.op!r} in int8")
    entries = [e.network.scales[str(var)] for var in site.operands]
    worth = math.prod(e.quantizer.scale(entry) for entry in entries)
    return _finish(e, site, value, worth)


def _weighted(e: Emitter, site: Int8Node, x: Value) -> Value:
    """A convolution or dot with a weight."""
    int8, multiplier, bias = _stored(e, site)
    entry = e.network.scales[str(site.operands[0])]
    input_scale = e.quantizer.scale(entry)
    shape = e.shape(site.node.outputs[0])
    if site.node.op == "conv_general_dilated":
        form = contraction.conv_form(site.node, int8.shape)
        kernel = form.kernel(int8)
        weight = make_weight(kernel, form.channel_axis, multiplier, bias, input_scale)
        names = e.quantizer.weight(weight), e.quantizer.bias(weight, entry)
        value = contraction.conv(e.builder, site.node, form, x, *names, shape)
        return _moved(e, site, value)
    side = 1 - site.weight_position
    ranks = (x.rank, int8.ndim) if side == 0 else (int8.ndim, x.rank)
    dot = contraction.dot_form(site.node, ranks)
    if dot.batch[0]:
        return _batched_dot(e, site, dot, x, int8, input_scale)
    order = (*dot.contracted[1 - side], *dot.free[1 - side])
    width = math.prod(int8.shape[axis] for axis in dot.contracted[1 - side])
    matrix = int8.transpose(order).reshape(width, -1)
    weight = make_weight(matrix, 1, multiplier, bias, input_scale)
    names = e.quantizer.weight(weight), e.quantizer.bias(weight, entry)
    return _moved(e, site, contraction.weighted_dot(e.builder, dot, side, x, *names, shape))


def _stored(e: Emitter, site: Int8Node) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The int8 weight, and its site's multiplier and bias, [C] each."""
    arrays = e.quantizer.site(site.name)
    scale = np.ones(())
    if site.weight:
        int8 = e.arrays[site.weight]
    else:
        value = e.arrays[e.network.constants[str(site.computed_weight)]]
        int8, scale = _quantize_weight(value.astype(np.float32), site.weight_axes)
    channels = (math.prod(int8.shape[axis] for axis in site.weight_axes),)
    multiplier = np.broadcast_to(arrays["multiplier"].astype(np.float64) * scale, channels)
    if "bias" not in arrays:
        return int8, multiplier, None
    return int8, multiplier, np.broadcast_to(arrays["bias"].astype(np.float64), channels)


def _quantize_weight(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """As `jaxquant.run.int8.quantize_weight` does in the program."""
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = np.abs(weight).max(axis=summed, keepdims=True)
    scale = np.where(threshold > 0, threshold, np.float32(127)) / np.float32(127)
    int8 = np.clip(np.rint(weight * (np.float32(1) / scale)), -127, 127).astype(np.int8)
    return int8, scale.reshape(-1).astype(np.float64)


def _batched_dot(
    e: Emitter,
    site: Int8Node,
    form: contraction.DotForm,
    x: Value,
    int8: np.ndarray,
    input_scale: float,
) -> Value:
    """A dot with batch axes in its weight, whose channels are along several axes."""
    if not site.weight:
        raise NotCovered("a dot with batch axes and a computed weight")
    weight = Weight(int8, np.ones((), np.float32), None, 0)
    kernel = Value(e.quantizer.weight(weight), int8.shape, straight(int8.ndim))
    values = [x, kernel] if site.weight_position == 1 else [kernel, x]
    value = contraction.dot(e.builder, form, values, e.shape(site.node.outputs[0]))
    return _finish(e, site, value, input_scale)


def _moved(e: Emitter, site: Int8Node, value: Value) -> Value:
    """The rearrangements of the accumulator."""
    for node in site.movements:
        (value,) = e.apply(node, [value])
    return value


def _finish(e: Emitter, site: Int8Node, value: Value, worth: float) -> Value:
    """Rearrange, then multiply and add what no weight takes; `value` has the scale `worth`."""
    value, arrays = _moved(e, site, value), e.quantizer.site(site.name)
    ratio = arrays["multiplier"].astype(np.float64) / worth
    if np.ptp(ratio) == 0 and abs(ratio.flat[0] - 1) < 1e-6:
        pass
    elif np.ptp(ratio) == 0:
        value = dataclasses.replace(value, factor=value.factor * float(ratio.flat[0]))
    else:
        value = elementwise.apply(e.builder, "Mul", [value, _along(e, site, ratio, value.rank)])
    if "bias" in arrays:
        bias = _along(e, site, arrays["bias"], value.rank)
        value = elementwise.apply(e.builder, "Add", [value, bias])
    return value


def _along(e: Emitter, site: Int8Node, vector: np.ndarray, rank: int) -> Value:
    """[C] or [] along the channel axes of the result."""
    vector = vector.astype(np.float32)
    if vector.ndim == 0:
        return Value(e.builder.constant(vector), (), ())
    axes = site.channel_axes
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape: list[Size] = [1] * rank
    for k in order:
        shape[axes[k]] = site.channel_sizes[k]
    array = vector.reshape(site.channel_sizes).transpose(order).reshape([int(s) for s in shape])
    return Value(e.builder.constant(array), tuple(shape), straight(rank))
