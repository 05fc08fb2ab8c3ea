"""What gets the scales of its operands in each call, as `jaxquant.run.dynamic` computes them.

Every row of a dot's operand has its own, every sample and feature group of a convolution's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.deploy.lower.convolution import conv_form
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
      NotCovered: it is a ragged dot.
    """
    given, shape = site.node.contraction, e.shape(site.node.outputs[0])
    if given is not None and given.choosing is not None:
        raise NotCovered("an int8 ragged dot, whose rows choose their weight")
    if given is None or not given.is_dot:
        raise NotCovered("what is no convolution or dot and scales its operands in each call")
    values = [e.full(e.value(var), var) for var in site.operands]
    is_weighted = bool(site.weight) or site.computed_weight is not None
    if is_weighted and not given.has_batch:
        return _integer_dot(e, site, values[0])
    # Integers in float32, exact up to 2^24, where no operator takes int8 with batch axes.
    sides = [s for s in (0, 1) if not (is_weighted and s == site.weight_position)]
    if len(values) < len(sides):  # a tensor with itself
        values = values * 2
    factors = [
        _rounded(e, value, given.operands[side].contracted, site.asymmetric)
        for value, side in zip(values, sides, strict=True)
    ]
    if is_weighted:
        factors.insert(site.weight_position, _whole_weight(e, site))
    return contraction.dot(e.builder, given, factors, shape)


def conv(e: Emitter, site: Int8Node) -> Value:
    """The sums of a convolution times the scales of its input, without its multiplier and bias.

    It is ConvInteger; ONNX has no such transposed one, which is computed in float32 on the same
    integers.

    Raises:
      NotCovered: runtimes have no such convolution.
    """
    b, given, shape = e.builder, site.node.contraction, e.shape(site.node.outputs[0])
    assert given is not None, "a convolution"
    int8 = site_arrays(e.model, site).int8
    form = conv_form(given, int8.shape)
    order = contraction.kernel_order(form)
    stored = form.kernel(int8, order)
    (var,) = site.operands
    x = b.ordered(e.full(e.value(var), var), contraction.input_order(given))

    # One grid for each sample and feature group: [N, G, 1], then [N, channels, 1, ...].
    rows = b.node("Reshape", [x.name, b.ints([0, form.feature_groups, -1])])
    grid = _grid(e, rows, [2], False)
    inputs, outputs = int8.shape[form.inputs], int8.shape[form.outputs] // form.feature_groups
    inverse = _by_channel(e, grid.inverse, form.feature_groups, inputs, x.rank)
    scale = _by_channel(e, grid.scale, form.feature_groups, outputs, x.rank)

    steps = _integers(e, x.name, grid._replace(inverse=inverse))
    if form.is_transposed:
        kernel = b.constant(stored.astype(np.float32), "weight")
        x = dataclasses.replace(x, name=steps)
        sums = contraction.conv(b, given, form, x, [kernel], shape)
    else:
        steps = b.node("Add", [steps, b.constant(np.float32(128))])
        steps = b.node("Cast", [steps], to=elementwise.ONNX_TYPES["uint8"])
        integers, zero_point = e.quantizer.integers(stored, (), e.quantizer.target.dot_weight())
        others = [integers, b.constant(np.uint8(128), "zero_point"), zero_point]
        x = dataclasses.replace(x, name=steps)
        sums = contraction.conv(b, given, form, x, others, shape, is_integer=True)
        name = b.node("Cast", [sums.name], to=elementwise.ONNX_TYPES["float32"])
        sums = dataclasses.replace(sums, name=name)
    return dataclasses.replace(sums, name=b.node("Mul", [sums.name, scale]))


def _by_channel(e: Emitter, name: str, groups: int, count: int, rank: int) -> str:
    """[N, G, 1] for a tensor [N, channels, ...] of this rank, with so many channels a group."""
    b = e.builder
    if count > 1 and groups > 1:
        name = b.node("Expand", [name, b.ints([1, 1, count])])
    channels = groups * count if groups > 1 else 1
    return b.node("Reshape", [name, b.ints([0, channels, *[1] * (rank - 2)])])


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
    matrix = int8.transpose((*weight.contracted, *weight.free)).reshape(width, -1)
    form, is_table = e.quantizer.target.dot_weight(), site.weight in e.tables
    integers, zero_point = e.quantizer.integers(matrix, (), form, is_table)
    # uint8 with zero point 128: runtimes multiply that by every form of a weight.
    middle = [integers, b.constant(np.uint8(128), "zero_point"), zero_point]
    grid = _grid(e, name, [len(own.free)], site.asymmetric)
    rows = b.node("Add", [_integers(e, name, grid), b.constant(np.float32(128))])
    rows = b.node("Cast", [rows], to=elementwise.ONNX_TYPES["uint8"])
    total = b.node("MatMulInteger", [rows, *middle])
    if grid.zero_point is not None:
        sums = b.constant(matrix.sum(axis=0, dtype=np.int64).astype(np.int32), "weight_sum")
        shift = b.node("Cast", [grid.zero_point], to=elementwise.ONNX_TYPES["int32"])
        total = b.node("Sub", [total, b.node("Mul", [shift, sums])])
    total = b.node("Cast", [total], to=elementwise.ONNX_TYPES["float32"])
    steps = b.constant(multiplier.astype(np.float32), "steps")
    # One after the other: of the product of both scales ONNX Runtime 1.32 makes a fused operator
    # with MatMulInteger, which loses the bias.
    name = b.node("Mul", [b.node("Mul", [total, steps]), grid.scale])
    if bias is not None:
        name = b.node("Add", [name, b.constant(bias.astype(np.float32), "bias")])
    return contraction.of_rows(b, given, side, name, e.shape(site.node.outputs[0]))


def _rounded(e: Emitter, value: Value, summed: Sequence[int], is_asymmetric: bool) -> Value:
    """A tensor on the grids of its rows, in float: `summed` are the axes along a row."""
    b, value = e.builder, e.builder.plain(value)
    grid = _grid(e, value.name, sorted(value.axis(axis) for axis in summed), is_asymmetric)
    steps = _integers(e, value.name, grid)
    if grid.zero_point is not None:
        steps = b.node("Sub", [steps, grid.zero_point])
    return dataclasses.replace(value, name=b.node("Mul", [steps, grid.scale]))


class _Grid(NamedTuple):
    """The grids of rows, float32 tensors; the zero points too, None where they are 0."""

    inverse: str
    scale: str
    zero_point: str | None = None


def _integers(e: Emitter, name: str, grid: _Grid) -> str:
    """A tensor in steps of its grids, as floats."""
    b = e.builder
    steps = b.node("Round", [b.node("Mul", [name, grid.inverse])])
    if grid.zero_point is None:
        return steps
    return _clipped(e, b.node("Add", [steps, grid.zero_point]))


def _grid(e: Emitter, name: str, axes: Sequence[int], is_asymmetric: bool) -> _Grid:
    """The grids of rows along some physical axes, as `jaxquant.run.dynamic` computes them."""
    b = e.builder
    if not is_asymmetric:
        largest = _reduced(e, "ReduceMax", b.node("Abs", [name]), axes)
        largest = b.node("Max", [largest, b.constant(np.float32(LARGEST * SMALLEST_SCALE))])
        inverse = b.node("Div", [b.constant(np.float32(LARGEST)), largest])
        return _Grid(inverse, b.node("Mul", [largest, b.constant(np.float32(1 / LARGEST))]))
    zero, half = b.constant(np.float32(0)), b.constant(np.float32(0.5))
    low = b.node("Min", [_reduced(e, "ReduceMin", name, axes), zero])
    high = b.node("Max", [_reduced(e, "ReduceMax", name, axes), zero])
    # Halves first: high - low may be beyond float32 where both are not.
    width = b.node("Sub", [b.node("Mul", [high, half]), b.node("Mul", [low, half])])
    step = b.node("Mul", [width, b.constant(np.float32(2 / 255))])
    scale = b.node("Max", [step, b.constant(np.float32(SMALLEST_SCALE))])
    inverse = b.node("Div", [b.constant(np.float32(1)), scale])
    least = b.node("Round", [b.node("Mul", [low, inverse])])
    zero_point = b.node("Sub", [b.constant(np.float32(-128)), least])
    return _Grid(inverse, scale, _clipped(e, zero_point))


def _clipped(e: Emitter, name: str) -> str:
    limits = [e.builder.constant(np.float32(bound)) for bound in (-128, 127)]
    return e.builder.node("Clip", [name, *limits])


def _reduced(e: Emitter, operator: str, name: str, axes: Sequence[int]) -> str:
    """ReduceMax or ReduceMin along physical axes, which keep size 1."""
    b = e.builder
    if b.opset < 18:
        return b.node(operator, [name], axes=list(axes), keepdims=1)
    return b.node(operator, [name, b.ints(axes)], keepdims=1)
