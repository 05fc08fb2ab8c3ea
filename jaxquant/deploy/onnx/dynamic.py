"""What gets the scales of its operands in each call, as `jaxquant.run.dynamic` computes them.

Every row of a dot's operand has its own, every sample and feature group of a convolution's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.deploy.lower.convolution import ConvForm, conv_form
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.lower.weights import Weight, site_arrays
from jaxquant.deploy.network import Int8Node
from jaxquant.deploy.onnx import contraction, elementwise
from jaxquant.deploy.onnx.emitter import Emitter
from jaxquant.graph.contraction import Contraction
from jaxquant.plan.grid import SMALLEST_SCALE

LARGEST = 127.0


def dot(emitter: Emitter, site: Int8Node) -> Value:
    """The result of a dot, before the rearrangements of its epilogue.

    With a weight it is MatMulInteger; two tensors are rounded to their grids and multiplied in
    float32, which gives the same but for the order of the sums.

    Raises:
      NotCovered: it is a ragged dot.
    """
    given, shape = site.node.contraction, emitter.shape(site.node.outputs[0])
    if given is not None and given.choosing is not None:
        raise NotCovered("an int8 ragged dot, whose rows choose their weight")
    if given is None or not given.is_dot:
        raise NotCovered("what is no convolution or dot and scales its operands in each call")
    values = [emitter.full(emitter.value(var), var) for var in site.operands]
    is_weighted = bool(site.weight) or site.computed_weight is not None
    if is_weighted and not given.has_batch:
        return _integer_dot(emitter, site, values[0])
    # Integers in float32, exact up to 2^24, where no operator takes int8 with batch axes.
    sides = [s for s in (0, 1) if not (is_weighted and s == site.weight_position)]
    if len(values) < len(sides):  # a tensor with itself
        values = values * 2
    factors = [
        _rounded(emitter, value, given.operands[side].contracted, site.asymmetric)
        for value, side in zip(values, sides, strict=True)
    ]
    if is_weighted:
        factors.insert(site.weight_position, _whole_weight(emitter, site))
    return contraction.dot(emitter.builder, given, factors, shape)


def conv(emitter: Emitter, site: Int8Node) -> Value:
    """The sums of a convolution times the scales of its input, without its multiplier and bias.

    It is ConvInteger; ONNX has no such transposed one, which is computed in float32 on the same
    integers.

    Raises:
      NotCovered: runtimes have no such convolution.
    """
    builder, given, shape = (
        emitter.builder,
        site.node.contraction,
        emitter.shape(site.node.outputs[0]),
    )
    assert given is not None, "a convolution"
    int8 = site_arrays(emitter.model, site).int8
    form = conv_form(given, int8.shape)
    order = contraction.kernel_order(form)
    stored = form.kernel(int8, order)
    (var,) = site.operands
    x = builder.ordered(emitter.full(emitter.value(var), var), contraction.input_order(given))

    # One grid for each sample and feature group: [N, G, 1], then [N, channels, 1, ...].
    rows = builder.node("Reshape", [x.name, builder.ints([0, form.feature_groups, -1])])
    grid = _grid(emitter, rows, [2], False)
    inputs, outputs = int8.shape[form.inputs], int8.shape[form.outputs] // form.feature_groups
    inverse = _by_channel(emitter, grid.inverse, form.feature_groups, inputs, x.rank)
    scale = _by_channel(emitter, grid.scale, form.feature_groups, outputs, x.rank)

    x = dataclasses.replace(x, name=_integers(emitter, x.name, grid._replace(inverse=inverse)))
    # ONNX has no such operator of integers; in float32 sums of them are exact up to 2^24.
    if form.is_transposed:
        kernel = builder.constant(stored.astype(np.float32), "weight")
        sums = contraction.conv(builder, given, form, x, [kernel], shape)
    else:
        sums = _integer_conv(emitter, given, form, x, stored, shape)
    return dataclasses.replace(sums, name=builder.node("Mul", [sums.name, scale]))


def _integer_conv(
    emitter: Emitter,
    given: Contraction,
    form: ConvForm,
    steps: Value,
    stored: np.ndarray,
    shape: tuple[Size, ...],
) -> Value:
    """The sums of a ConvInteger, as floats; `steps` are the integers of its input, as floats."""
    builder = emitter.builder
    # uint8, 128 more: runtimes multiply that by every form of a weight.
    name = builder.node("Add", [steps.name, builder.constant(np.float32(128))])
    name = builder.node("Cast", [name], to=elementwise.ONNX_TYPES["uint8"])
    integers, zero_point = emitter.quantizer.integers(
        stored, (), emitter.quantizer.target.dot_weight()
    )
    others = [integers, builder.constant(np.uint8(128), "zero_point"), zero_point]
    x = dataclasses.replace(steps, name=name)
    sums = contraction.conv(builder, given, form, x, others, shape, is_integer=True)
    # The sums are int32; what follows is float.
    name = builder.node("Cast", [sums.name], to=elementwise.ONNX_TYPES["float32"])
    return dataclasses.replace(sums, name=name)


def _by_channel(emitter: Emitter, name: str, groups: int, count: int, rank: int) -> str:
    """[N, G, 1] for a tensor [N, channels, ...] of this rank, with so many channels a group."""
    builder = emitter.builder
    if count > 1 and groups > 1:
        name = builder.node("Expand", [name, builder.ints([1, 1, count])])
    channels = groups * count if groups > 1 else 1
    return builder.node("Reshape", [name, builder.ints([0, channels, *[1] * (rank - 2)])])


def _whole_weight(emitter: Emitter, site: Int8Node) -> Value:
    """The integers of a weight, as floats."""
    int8 = site_arrays(emitter.model, site).int8
    one = np.ones((), np.float32)
    name = emitter.quantizer.weight(
        Weight(int8, one, one, None, 0), emitter.quantizer.target.dot_weight()
    )
    return Value(name, int8.shape, tuple(range(int8.ndim)))


def _integer_dot(emitter: Emitter, site: Int8Node, x: Value) -> Value:
    """A dot with a weight in int32, with its scales, multiplier and bias."""
    builder, given = emitter.builder, site.node.contraction
    assert given is not None, "a dot"
    side = 1 - site.weight_position
    own, weight = given.operands[side], given.operands[site.weight_position]
    int8, multiplier, bias = site_arrays(emitter.model, site)
    x = builder.ordered(x, (*own.free, *own.contracted))
    width = math.prod(int8.shape[axis] for axis in weight.contracted)
    name = x.name
    if len(own.contracted) != 1:
        name = builder.reshape(name, x.physical, [*(x.shape[axis] for axis in own.free), width])
    matrix = int8.transpose((*weight.contracted, *weight.free)).reshape(width, -1)
    form, is_table = emitter.quantizer.target.dot_weight(), site.weight in emitter.tables
    integers, zero_point = emitter.quantizer.integers(matrix, (), form, is_table)
    # uint8 with zero point 128: runtimes multiply that by every form of a weight.
    middle = [integers, builder.constant(np.uint8(128), "zero_point"), zero_point]
    grid = _grid(emitter, name, [len(own.free)], site.asymmetric)
    rows = builder.node("Add", [_integers(emitter, name, grid), builder.constant(np.float32(128))])
    rows = builder.node("Cast", [rows], to=elementwise.ONNX_TYPES["uint8"])
    total = builder.node("MatMulInteger", [rows, *middle])
    if grid.zero_point is not None:
        # Σ (q - z) w = Σ q w - z Σ w: rows have zero points of their own, which the operator does
        # not take.
        sums = builder.constant(matrix.sum(axis=0, dtype=np.int64).astype(np.int32), "weight_sum")
        shift = builder.node("Cast", [grid.zero_point], to=elementwise.ONNX_TYPES["int32"])
        total = builder.node("Sub", [total, builder.node("Mul", [shift, sums])])
    total = builder.node("Cast", [total], to=elementwise.ONNX_TYPES["float32"])
    steps = builder.constant(multiplier.astype(np.float32), "steps")
    # One after the other: of the product of both scales ONNX Runtime 1.32 makes a fused operator
    # with MatMulInteger, which loses the bias.
    name = builder.node("Mul", [builder.node("Mul", [total, steps]), grid.scale])
    if bias is not None:
        name = builder.node("Add", [name, builder.constant(bias.astype(np.float32), "bias")])
    return contraction.of_rows(builder, given, side, name, emitter.shape(site.node.outputs[0]))


def _rounded(emitter: Emitter, value: Value, summed: Sequence[int], is_asymmetric: bool) -> Value:
    """A tensor on the grids of its rows, in float: `summed` are the axes along a row."""
    builder, value = emitter.builder, emitter.builder.plain(value)
    grid = _grid(emitter, value.name, sorted(value.axis(axis) for axis in summed), is_asymmetric)
    steps = _integers(emitter, value.name, grid)
    if grid.zero_point is not None:
        steps = builder.node("Sub", [steps, grid.zero_point])
    return dataclasses.replace(value, name=builder.node("Mul", [steps, grid.scale]))


class _Grid(NamedTuple):
    """The grids of rows, float32 tensors; the zero points too, None where they are 0."""

    inverse: str
    scale: str
    zero_point: str | None = None


def _integers(emitter: Emitter, name: str, grid: _Grid) -> str:
    """A tensor in steps of its grids, as floats."""
    builder = emitter.builder
    steps = builder.node("Round", [builder.node("Mul", [name, grid.inverse])])
    if grid.zero_point is None:
        return steps
    return _clipped(emitter, builder.node("Add", [steps, grid.zero_point]))


def _grid(emitter: Emitter, name: str, axes: Sequence[int], is_asymmetric: bool) -> _Grid:
    """The grids of rows along some physical axes, as `jaxquant.run.dynamic` computes them."""
    builder = emitter.builder
    if not is_asymmetric:
        largest = _reduced(emitter, "ReduceMax", builder.node("Abs", [name]), axes)
        largest = builder.node(
            "Max", [largest, builder.constant(np.float32(LARGEST * SMALLEST_SCALE))]
        )
        inverse = builder.node("Div", [builder.constant(np.float32(LARGEST)), largest])
        return _Grid(
            inverse, builder.node("Mul", [largest, builder.constant(np.float32(1 / LARGEST))])
        )
    # Zero is on the grid, so that padding and ReLU stay what they are.
    zero, half = builder.constant(np.float32(0)), builder.constant(np.float32(0.5))
    low = builder.node("Min", [_reduced(emitter, "ReduceMin", name, axes), zero])
    high = builder.node("Max", [_reduced(emitter, "ReduceMax", name, axes), zero])
    # Halves first: high - low may be beyond float32 where both are not.
    width = builder.node(
        "Sub", [builder.node("Mul", [high, half]), builder.node("Mul", [low, half])]
    )
    step = builder.node("Mul", [width, builder.constant(np.float32(2 / 255))])
    scale = builder.node("Max", [step, builder.constant(np.float32(SMALLEST_SCALE))])

    # The inverse is divided once for each row, and multiplied once for each value.
    inverse = builder.node("Div", [builder.constant(np.float32(1)), scale])
    least = builder.node("Round", [builder.node("Mul", [low, inverse])])
    zero_point = builder.node("Sub", [builder.constant(np.float32(-128)), least])
    return _Grid(inverse, scale, _clipped(emitter, zero_point))


def _clipped(emitter: Emitter, name: str) -> str:
    limits = [emitter.builder.constant(np.float32(bound)) for bound in (-128, 127)]
    return emitter.builder.node("Clip", [name, *limits])


def _reduced(emitter: Emitter, operator: str, name: str, axes: Sequence[int]) -> str:
    """ReduceMax or ReduceMin along physical axes, which keep size 1."""
    builder = emitter.builder
    if builder.opset < 18:
        return builder.node(operator, [name], axes=list(axes), keepdims=1)
    return builder.node(operator, [name, builder.ints(axes)], keepdims=1)
