"""Dots whose operands get their scales in each call, a row at a time, as `jaxquant.run.dynamic`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.lower.weights import Weight, site_arrays
from jaxquant.deploy.network import Int8Node
from jaxquant.deploy.onnx import contraction, elementwise
from jaxquant.deploy.onnx.emitter import Emitter
from jaxquant.plan.grid import SMALLEST_SCALE

LARGEST = 127.0


def dot(e: Emitter, site: Int8Node) -> Value:
    """The result of a dot, before the rearrangements of its epilogue.

    With a weight it is MatMulInteger; two tensors are rounded to their grids and multiplied in
    float32, which gives the same but for the order of the sums.

    Raises:
      NotCovered: it is a convolution, or a ragged dot.
    """
    given, shape = site.node.contraction, e.shape(site.node.outputs[0])
    if given is not None and given.choosing is not None:
        raise NotCovered("an int8 ragged dot, whose rows choose their weight")
    if given is None or not given.is_dot:
        raise NotCovered("what is no dot and scales its operands in each call")
    values = [e.full(e.value(var), var) for var in site.operands]
    is_weighted = bool(site.weight) or site.computed_weight is not None
    if is_weighted and not given.has_batch:
        return _integer_dot(e, site, values[0])
    sides = [s for s in (0, 1) if not (is_weighted and s == site.weight_position)]
    if len(values) < len(sides):  # a tensor with itself
        values = values * 2
    factors = [
        _rounded(e, value, given.operands[side].contracted)
        for value, side in zip(values, sides, strict=True)
    ]
    if is_weighted:
        factors.insert(site.weight_position, _whole_weight(e, site))
    return contraction.dot(e.builder, given, factors, shape)


def _whole_weight(e: Emitter, site: Int8Node) -> Value:
    """The integers of a weight, as floats."""
    int8 = site_arrays(e.model, site).int8
    one = np.ones((), np.float32)
    name = e.quantizer.weight(Weight(int8, one, one, None, 0), e.quantizer.target.dot_weight())
    return Value(name, int8.shape, tuple(range(int8.ndim)))


def _integer_dot(e: Emitter, site: Int8Node, x: Value) -> Value:
    """A dot with a weight in int32, with its scales, multiplier and bias."""
    b, given = e.builder, site.node.contraction
    assert given is not None, "a dot"
    side = 1 - site.weight_position
    own, weight = given.operands[side], given.operands[site.weight_position]
    int8, multiplier, bias = site_arrays(e.model, site)
    x = b.ordered(x, (*own.free, *own.contracted))
    width = math.prod(int8.shape[axis] for axis in weight.contracted)
    name = x.name
    if len(own.contracted) != 1:
        name = b.reshape(name, x.physical, [*(x.shape[axis] for axis in own.free), width])
    inverse, scale = _grid(e, name, [len(own.free)])
    # uint8 with zero point 128: runtimes multiply that by every form of a weight.
    rows = b.node("Round", [b.node("Mul", [name, inverse])])
    rows = b.node("Add", [rows, b.constant(np.float32(128))])
    rows = b.node("Cast", [rows], to=elementwise.ONNX_TYPES["uint8"])
    matrix = int8.transpose((*weight.contracted, *weight.free)).reshape(width, -1)
    integers, zero_point = e.quantizer.integers(matrix, (), e.quantizer.target.dot_weight())
    inputs = [rows, integers, b.constant(np.uint8(128), "zero_point"), zero_point]
    total = b.node("Cast", [b.node("MatMulInteger", inputs)], to=elementwise.ONNX_TYPES["float32"])
    steps = b.constant(multiplier.astype(np.float32), "steps")
    # One after the other: of the product of both scales ONNX Runtime 1.32 makes a fused operator
    # with MatMulInteger, which loses the bias.
    name = b.node("Mul", [b.node("Mul", [total, steps]), scale])
    if bias is not None:
        name = b.node("Add", [name, b.constant(bias.astype(np.float32), "bias")])
    return contraction.of_rows(b, given, side, name, e.shape(site.node.outputs[0]))


def _rounded(e: Emitter, value: Value, summed: Sequence[int]) -> Value:
    """A tensor on the grids of its rows, in float: `summed` are the axes along a row."""
    value = e.builder.plain(value)
    inverse, scale = _grid(e, value.name, sorted(value.axis(axis) for axis in summed))
    steps = e.builder.node("Round", [e.builder.node("Mul", [value.name, inverse])])
    return dataclasses.replace(value, name=e.builder.node("Mul", [steps, scale]))


def _grid(e: Emitter, name: str, axes: Sequence[int]) -> tuple[str, str]:
    """What rows along some physical axes are multiplied by before they are rounded, and after."""
    b = e.builder
    largest = b.node("Abs", [name])
    if b.opset < 18:
        largest = b.node("ReduceMax", [largest], axes=list(axes), keepdims=1)
    else:
        largest = b.node("ReduceMax", [largest, b.ints(axes)], keepdims=1)
    least = b.constant(np.float32(LARGEST * SMALLEST_SCALE))
    largest = b.node("Max", [largest, least])
    inverse = b.node("Div", [b.constant(np.float32(LARGEST)), largest])
    return inverse, b.node("Mul", [largest, b.constant(np.float32(1 / LARGEST))])
