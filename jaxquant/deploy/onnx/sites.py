"""The accumulating int8 sites: their operands dequantized, their epilogue folded."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxquant.deploy.network import Int8Node
from jaxquant.deploy.onnx import contraction, elementwise, reduction
from jaxquant.deploy.onnx.builder import Value, straight
from jaxquant.deploy.onnx.emitter import Emitter
from jaxquant.deploy.onnx.errors import NotCovered
from jaxquant.deploy.onnx.nodes import Size
from jaxquant.deploy.onnx.quantization import Weight, make_weight
from jaxquant.graph.contraction import Contraction


def emit_site(e: Emitter, site: Int8Node) -> Value:
    """The float result of a site, at the end of its epilogue."""
    operands = [e.operand(var) for var in site.operands]
    if site.weight or site.computed_weight is not None:
        return _weighted(e, site, operands[0])
    node, shape = site.node, e.shape(site.node.outputs[0])
    if node.contraction is not None:
        values = operands * 2 if len(operands) == 1 else operands
        value = contraction.dot(e.builder, node.contraction, values, shape)
    elif node.op in reduction.OPERATIONS:
        value = reduction.emit(e.builder, node, operands[0], shape)
    else:
        raise NotCovered(f"the operation {node.op!r} in int8")
    entries = [e.network.scales[str(var)] for var in site.operands]
    worth = math.prod(e.quantizer.scale(entry) for entry in entries)
    arrays = e.quantizer.site(site.name)
    return _finish(e, site, value, arrays["multiplier"] / worth, arrays.get("bias"))


def _weighted(e: Emitter, site: Int8Node, x: Value) -> Value:
    """A convolution or dot with a weight."""
    entry = e.network.scales[str(site.operands[0])]
    int8, multiplier, bias = _arrays(e, site, e.quantizer.zero_point(entry))
    input_scale = e.quantizer.scale(entry)
    shape, given = e.shape(site.node.outputs[0]), site.node.contraction
    assert given is not None, "an operation with a weight is a convolution or dot"
    if given.window is not None:
        form = contraction.conv_form(given, int8.shape)
        stored = form.kernel(int8)
        weight = make_weight(stored, form.channel_axis, multiplier, bias, input_scale)
        is_dot = e.quantizer.target.is_onnxruntime and contraction.is_pointwise(form)
        if is_dot and not e.is_quantized(site.output):
            return _moved(e, site, _integer_dot(e, site, given, form, weight, entry, shape))
        weight_form = e.quantizer.target.conv_weight(form, stored.shape)
        names = e.quantizer.weight(weight, weight_form), e.quantizer.bias(weight)
        value = contraction.conv(e.builder, given, form, x, *names, shape)
        return _moved(e, site, value)
    side, own = 1 - site.weight_position, given.operands[site.weight_position]
    if given.has_batch:
        one = np.ones((), np.float32)
        unscaled = Weight(int8, one, one, None, 0)
        name = e.quantizer.weight(unscaled, e.quantizer.target.dot_weight())
        kernel = Value(name, int8.shape, straight(int8.ndim))
        values = [x, kernel] if side == 0 else [kernel, x]
        value = contraction.dot(e.builder, given, values, shape)
        return _finish(e, site, value, multiplier / input_scale, bias)
    width = math.prod(int8.shape[axis] for axis in own.contracted)
    matrix = int8.transpose((*own.contracted, *own.free)).reshape(width, -1)
    weight = make_weight(matrix, 1, multiplier, bias, input_scale)
    weight_form = e.quantizer.target.dot_weight()
    names = e.quantizer.weight(weight, weight_form), e.quantizer.bias(weight)
    return _moved(e, site, contraction.weighted_dot(e.builder, given, side, x, *names, shape))


def _integer_dot(
    e: Emitter,
    site: Int8Node,
    given: Contraction,
    form: contraction.ConvForm,
    weight: Weight,
    entry: str,
    shape: tuple[Size, ...],
) -> Value:
    """A 1x1 convolution to int32, and its epilogue in float32: what qapply computes, step by step.

    ONNX Runtime would run a Conv on floats here, since its result is not quantized again; its
    ConvInteger, for windows of any size, is slower than that.
    """
    b, own, result = e.builder, given.operands[0], given.result
    x = b.ordered(e.int8(site.operands[0]), (*own.free, *own.window, *own.contracted))
    name, strides = x.name, form.attributes["strides"]
    if any(stride != 1 for stride in strides):
        axes = range(1, 1 + len(strides))
        ends = [np.iinfo(np.int64).max] * len(strides)
        name = b.node("Slice", [name, *map(b.ints, ([0] * len(strides), ends, axes, strides))])
    matrix = weight.int8.reshape(weight.int8.shape[:2]).T
    integers, zero_point = e.quantizer.integers(matrix, (), e.quantizer.target.dot_weight())
    inputs = [name, integers, b.constant(e.quantizer.zero(entry)), zero_point]
    name = b.node("MatMulInteger", inputs)
    name = b.node("Cast", [name], to=elementwise.ONNX_TYPES["float32"])
    name = b.node("Mul", [name, b.constant(weight.steps, "steps")])
    if weight.bias is not None:
        name = b.node("Add", [name, b.constant(weight.bias.astype(np.float32), "bias")])
    return Value(name, shape, (*result.free[0], *result.window, *result.free[1]))


def _arrays(
    e: Emitter, site: Int8Node, zero_point: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The int8 weight, and its site's multiplier and bias, [C] each.

    In `qparams` the bias takes away what the zero point adds to the sums; a dequantized input has
    none to take away.
    """
    arrays = e.quantizer.site(site.name)
    scale = np.ones(())
    if site.weight:
        int8 = e.arrays[site.weight]
    else:
        constant = e.network.constants.get(str(site.computed_weight))
        if constant is None:
            raise NotCovered("a weight that the model makes to the size of the batch, in int8")
        value = e.arrays[constant]
        int8, scale = _quantize_weight(value.astype(np.float32), site.weight_axes)
    channels = (math.prod(int8.shape[axis] for axis in site.weight_axes),)
    multiplier = np.broadcast_to(arrays["multiplier"].astype(np.float64) * scale, channels)
    if "bias" not in arrays:
        return int8, multiplier, None
    bias = np.broadcast_to(arrays["bias"].astype(np.float64), channels)
    if zero_point and site.weight:
        summed = tuple(a for a in range(int8.ndim) if a not in site.weight_axes)
        bias = bias + multiplier * zero_point * int8.sum(summed, dtype=np.int64).reshape(-1)
    return int8, multiplier, bias


def _quantize_weight(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """As `jaxquant.run.accumulate` does in the program."""
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = np.abs(weight).max(axis=summed, keepdims=True)
    scale = np.where(threshold > 0, threshold, np.float32(127)) / np.float32(127)
    int8 = np.clip(np.rint(weight * (np.float32(1) / scale)), -127, 127).astype(np.int8)
    return int8, scale.reshape(-1).astype(np.float64)


def _moved(e: Emitter, site: Int8Node, value: Value) -> Value:
    """The rearrangements of the accumulator."""
    for node in site.movements:
        (value,) = e.apply(node, [value])
    return value


def _finish(
    e: Emitter, site: Int8Node, value: Value, ratio: np.ndarray, bias: np.ndarray | None
) -> Value:
    """Rearrange, then multiply and add what no weight takes: [C] or [] each."""
    value = _moved(e, site, value)
    if np.ptp(ratio) == 0:
        factor = value.factor * float(ratio.flat[0])
        value = dataclasses.replace(value, factor=1.0 if abs(factor - 1) < 1e-6 else factor)
    else:
        value = elementwise.apply(e.builder, "Mul", [value, _along(e, site, ratio, value.rank)])
    if bias is not None and bias.any():
        value = elementwise.apply(e.builder, "Add", [value, _along(e, site, bias, value.rank)])
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
