"""The accumulating int8 sites: their operands dequantized, their epilogue folded."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxquant.deploy.lower.convolution import ConvForm, conv_form
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.lower.weights import SiteArrays, Weight, make_weight, site_arrays
from jaxquant.deploy.network import Int8Node
from jaxquant.deploy.onnx import contraction, dynamic, elementwise, reduction
from jaxquant.deploy.onnx.emitter import Emitter
from jaxquant.graph.contraction import Contraction


def emit_site(emitter: Emitter, site: Int8Node) -> Value:
    """The float result of a site, at the end of its epilogue."""
    if site.dynamic:
        return _dynamic(emitter, site)
    operands = [emitter.operand(var) for var in site.operands]
    if site.weight or site.computed_weight is not None:
        return _weighted(emitter, site, operands[0])
    node, shape = site.node, emitter.shape(site.node.outputs[0])
    if node.contraction is not None:
        values = operands * 2 if len(operands) == 1 else operands
        value = contraction.dot(emitter.builder, node.contraction, values, shape)
    elif node.op in reduction.OPERATIONS:
        # Runtimes pool integers where the operand is dequantized right before it.
        value = reduction.emit(emitter.builder, node, operands[0], shape, is_int8=True)
    else:
        raise NotCovered(f"the operation {node.op!r} in int8")
    # The multiplier is of integer sums; here the operands are dequantized already.
    worth = math.prod(emitter.model.scales.scale(entry) for entry in emitter.model.entries(site))
    arrays = emitter.model.sites[site.name]
    return _finish(emitter, site, value, arrays["multiplier"] / worth, arrays.get("bias"))


def _dynamic(emitter: Emitter, site: Int8Node) -> Value:
    """A convolution or dot whose operands get their scales in each call."""
    given = site.node.contraction
    if given is not None and given.window is not None:
        _, multiplier, bias = site_arrays(emitter.model, site)
        return _finish(emitter, site, dynamic.conv(emitter, site), multiplier, bias)
    value = dynamic.dot(emitter, site)
    is_weighted = bool(site.weight) or site.computed_weight is not None
    # This dot has its multiplier and bias in it already.
    if is_weighted and given is not None and not given.has_batch:
        return _moved(emitter, site, value)
    arrays = emitter.model.sites[site.name]
    return _finish(emitter, site, value, arrays["multiplier"], arrays.get("bias"))


class _Weighted(NamedTuple):
    """A convolution or dot with a weight, which is being written.

    Attributes:
      site: the operation.
      contraction: what it does with its operands' axes.
      x: its other operand.
      arrays: its weight, and the epilogue's.
      input_scale: the step of `x`.
    """

    site: Int8Node
    contraction: Contraction
    x: Value
    arrays: SiteArrays
    input_scale: float


def _weighted(emitter: Emitter, site: Int8Node, x: Value) -> Value:
    """A convolution or dot with a weight."""
    given = site.node.contraction
    assert given is not None, "an operation with a weight is a convolution or dot"
    if given.choosing is not None:
        raise NotCovered("an int8 ragged dot, whose rows choose their weight")
    arrays = site_arrays(emitter.model, site)
    input_scale = emitter.model.scales.scale(emitter.model.entries(site)[0])
    weighted = _Weighted(site, given, x, arrays, input_scale)
    if given.window is not None:
        return _convolution(emitter, weighted)
    return _batched_dot(emitter, weighted) if given.has_batch else _dense(emitter, weighted)


def _convolution(emitter: Emitter, weighted: _Weighted) -> Value:
    site, given, x, arrays, input_scale = weighted
    shape = emitter.shape(site.node.outputs[0])
    form = conv_form(given, arrays.int8.shape)
    order = contraction.kernel_order(form)
    stored, channel_axis = form.kernel(arrays.int8, order), order.index(form.outputs)
    weight = make_weight(stored, channel_axis, arrays.multiplier, arrays.bias, input_scale)
    # ONNX Runtime has an int8 Conv only where its result is quantized again.
    is_dot = emitter.quantizer.target.is_onnxruntime and form.is_pointwise
    if is_dot and not emitter.model.uses.is_quantized(site.output):
        return _moved(emitter, site, _integer_dot(emitter, site, given, form, weight, shape))
    weight_form = emitter.quantizer.target.conv_weight(form)
    names = (emitter.quantizer.weight(weight, weight_form), emitter.quantizer.bias(weight))
    read = [name for name in names if name]
    value = contraction.conv(emitter.builder, given, form, x, read, shape)
    return _moved(emitter, site, value)


def _batched_dot(emitter: Emitter, weighted: _Weighted) -> Value:
    """A dot with batch axes, which leave no axis for scales: they follow the product."""
    site, given, x, arrays, input_scale = weighted
    one = np.ones((), np.float32)
    unscaled = Weight(arrays.int8, one, one, None, 0)
    name = emitter.quantizer.weight(unscaled, emitter.quantizer.target.dot_weight())
    kernel = Value(name, arrays.int8.shape, straight(arrays.int8.ndim))
    values = [x, kernel] if site.weight_position == 1 else [kernel, x]
    value = contraction.dot(emitter.builder, given, values, emitter.shape(site.node.outputs[0]))
    return _finish(emitter, site, value, arrays.multiplier / input_scale, arrays.bias)


def _dense(emitter: Emitter, weighted: _Weighted) -> Value:
    """A dot without batch axes, whose weight is a matrix."""
    site, given, x, arrays, input_scale = weighted
    side, own = 1 - site.weight_position, given.operands[site.weight_position]
    int8, shape = arrays.int8, emitter.shape(site.node.outputs[0])
    width = math.prod(int8.shape[axis] for axis in own.contracted)
    matrix = int8.transpose((*own.contracted, *own.free)).reshape(width, -1)
    weight = make_weight(matrix, 1, arrays.multiplier, arrays.bias, input_scale)

    # Behind a MatMul runtimes add the bias in float32; its steps are for a Gemm, in integers.
    is_gemm = len(given.operands[side].free) == 1
    bias_name = emitter.quantizer.bias(weight) if is_gemm else emitter.quantizer.float_bias(weight)
    weight_form, is_table = emitter.quantizer.target.dot_weight(), site.weight in emitter.tables
    names = emitter.quantizer.weight(weight, weight_form, is_table), bias_name
    return _moved(
        emitter, site, contraction.weighted_dot(emitter.builder, given, side, x, *names, shape)
    )


def _integer_dot(
    emitter: Emitter,
    site: Int8Node,
    given: Contraction,
    form: ConvForm,
    weight: Weight,
    shape: tuple[Size, ...],
) -> Value:
    """A 1x1 convolution to int32, and its epilogue in float32: what qapply computes, step by step.

    ONNX Runtime would run a Conv on floats here, since its result is not quantized again; its
    ConvInteger, for windows of any size, is slower than that.
    """
    builder, own, result = emitter.builder, given.operands[0], given.result
    x = builder.ordered(emitter.int8(site.operands[0]), (*own.free, *own.window, *own.contracted))
    name, strides = x.name, form.strides
    if any(stride != 1 for stride in strides):
        axes = range(1, 1 + len(strides))
        ends = [np.iinfo(np.int64).max] * len(strides)
        name = builder.node(
            "Slice", [name, *map(builder.ints, ([0] * len(strides), ends, axes, strides))]
        )
    # 1x1: pixels are the rows of a matrix, strides leave some of them out.
    matrix = weight.int8.reshape(weight.int8.shape[:2]).T
    integers, zero_point = emitter.quantizer.integers(
        matrix, (), emitter.quantizer.target.dot_weight()
    )

    # As MatMulInteger takes both: integers with their zero points, and no scale.
    zero = builder.constant(emitter.quantizer.zero(emitter.model.entries(site)[0]))
    inputs = [name, integers, zero, zero_point]
    name = builder.node("MatMulInteger", inputs)
    name = builder.node("Cast", [name], to=elementwise.ONNX_TYPES["float32"])
    name = builder.node("Mul", [name, builder.constant(weight.steps, "steps")])
    if bias := emitter.quantizer.float_bias(weight):
        name = builder.node("Add", [name, bias])
    return Value(name, shape, (*result.free[0], *result.window, *result.free[1]))


def _moved(emitter: Emitter, site: Int8Node, value: Value) -> Value:
    """The rearrangements of the accumulator."""
    for node in site.movements:
        (value,) = emitter.apply(node, [value])
    return value


def _finish(
    emitter: Emitter, site: Int8Node, value: Value, ratio: np.ndarray, bias: np.ndarray | None
) -> Value:
    """Rearrange, then multiply and add what no weight takes: [C] or [] each."""
    value = _moved(emitter, site, value)
    # One number for all channels goes along with the value, into whatever multiplies next.
    if np.ptp(ratio) == 0:
        factor = value.factor * float(ratio.flat[0])
        value = dataclasses.replace(value, factor=1.0 if abs(factor - 1) < 1e-6 else factor)
    else:
        value = elementwise.apply(
            emitter.builder, "Mul", [value, _along(emitter, site, ratio, value.rank)]
        )
    if bias is not None and bias.any():
        value = elementwise.apply(
            emitter.builder, "Add", [value, _along(emitter, site, bias, value.rank)]
        )
    return value


def _along(emitter: Emitter, site: Int8Node, vector: np.ndarray, rank: int) -> Value:
    """[C] or [] along the channel axes of the result."""
    vector = vector.astype(np.float32)
    if vector.ndim == 0:
        return Value(emitter.builder.constant(vector), (), ())
    axes = site.channel_axes

    # In the order of the result's axes, in which the vector is reshaped.
    order = sorted(range(len(axes)), key=lambda k: axes[k])
    shape: list[Size] = [1] * rank
    for k in order:
        shape[axes[k]] = site.channel_sizes[k]
    array = vector.reshape(site.channel_sizes).transpose(order).reshape([int(s) for s in shape])
    return Value(emitter.builder.constant(array), tuple(shape), straight(rank))
