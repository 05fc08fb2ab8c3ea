"""The int8 operations: quantize, and convolution and dot with int32 accumulation.

Round half to even.  A tensor with zero point z stands for its integers less z, on [-128, 127]; with
zero point 0 for its integers, on [-127, 127].  Each operation is exact in integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir, jax_shim

# XLA's int8 convolution of fewer input channels, or of this few to as few, is slow on CPU.
_FEW_CHANNELS = 16
_PADDED_CHANNELS = 32
# A depthwise window of at most this many taps runs as shifted multiply-adds.
_MAX_TAPS = 64


def quantize(x: jax.Array, inv_scale: jax.Array, zero_point: int = 0) -> jax.Array:
    """Round `x * inv_scale` half to even, add the zero point and saturate; any shape, to int8."""
    scaled = lax.round(x.astype(jnp.float32) * inv_scale, lax.RoundingMethod.TO_NEAREST_EVEN)
    if zero_point:
        scaled = scaled + jnp.float32(zero_point)
    lowest = jnp.float32(-128 if zero_point else -127)
    return lax.clamp(lowest, scaled, jnp.float32(127)).astype(jnp.int8)


def dequantize(x: jax.Array, scale: jax.Array, zero_point: int = 0) -> jax.Array:
    """What int8 values stand for, as float32; any shape."""
    value = x.astype(jnp.float32)
    return (value - jnp.float32(zero_point) if zero_point else value) * scale


def quantize_weight(weight: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A weight that is computed in the program: int8, and its scale [C] along `axes`."""
    weight = weight.astype(jnp.float32)
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = jnp.max(jnp.abs(weight), axis=summed, keepdims=True)
    scale = jnp.where(threshold > 0, threshold, jnp.float32(127)) / jnp.float32(127)
    return quantize(weight, jnp.float32(1) / scale), scale.reshape(-1)


def weight_sums(weight: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sums of an int8 weight over all but `axes`: int32 [C]."""
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    return jnp.sum(weight, axis=summed, dtype=jnp.int32).reshape(-1)


def accumulate(
    eqn: ir.Equation, operands: Sequence[jax.Array], zero_points: Sequence[int]
) -> jax.Array:
    """A convolution or dot of a tensor with a weight, to int32.

    The sum keeps `zero_point * sum(weight)`, which the site's bias takes away; what pads the input
    adds to it too.
    """
    if eqn.name == "conv_general_dilated":
        return conv(operands[0], operands[1], eqn.params, zero_points[0])
    return dot((operands[0], operands[1]), eqn.params)


def combine(
    eqn: ir.Equation, operands: Sequence[jax.Array], zero_points: Sequence[int]
) -> jax.Array:
    """A dot of two tensors, or a sum over one, of the values less their zero points; to int32."""
    if eqn.name == "dot_general":
        return dot_of_tensors((operands[0], operands[1]), eqn.params, zero_points)
    values = [x.astype(jnp.int32) - z for x, z in zip(operands, zero_points, strict=True)]
    (total,) = jax_shim.bind(eqn.primitive, values, dict(eqn.params))
    return total


def dot(operands: tuple[jax.Array, jax.Array], params: Mapping[str, Any]) -> jax.Array:
    """`dot_general` of two int8 arrays to int32; `params` are those of the float equation."""
    return lax.dot_general(*operands, params["dimension_numbers"], preferred_element_type=jnp.int32)


def dot_of_tensors(
    operands: tuple[jax.Array, jax.Array], params: Mapping[str, Any], zero_points: Sequence[int]
) -> jax.Array:
    """`dot` of two tensors less their zero points, by the sums along the contracted axes.

    sum (a - z)(b - w) = sum a b - w sum a - z sum b + z w K
    """
    total = dot(operands, params)
    contract, batch = params["dimension_numbers"]
    free = [x.ndim - len(c) - len(b) for x, c, b in zip(operands, contract, batch, strict=True)]
    z, w = zero_points
    if w:
        total = total - w * _sums(operands[0], contract[0], batch[0], 0, free[1])
    if z:
        total = total - z * _sums(operands[1], contract[1], batch[1], free[0], 0)
    if z and w:
        total = total + z * w * math.prod(operands[0].shape[a] for a in contract[0])
    return total


def _sums(
    x: jax.Array, contract: Sequence[int], batch: Sequence[int], before: int, after: int
) -> jax.Array:
    """int32 sums over the contracted axes, placed as in the dot: batch, `before`, free, `after`."""
    rest = [a for a in range(x.ndim) if a not in (*contract, *batch)]
    ordered = x.astype(jnp.int32).transpose([*batch, *rest, *contract])
    sums = jnp.sum(ordered, axis=tuple(range(len(batch) + len(rest), x.ndim)), dtype=jnp.int32)
    shape = sums.shape
    return sums.reshape(*shape[: len(batch)], *[1] * before, *shape[len(batch) :], *[1] * after)


def conv(
    x: jax.Array, kernel: jax.Array, params: Mapping[str, Any], zero_point: int = 0
) -> jax.Array:
    """Convolution of int8 arrays to int32; `params` are those of the float equation.

    What pads the input, and lies between its elements where it is dilated, is the zero point.
    Of several exact forms the one that XLA runs fastest on CPU; `experiments/benchmarks/conv.py`
    times them.
    """
    if _is_small_depthwise(kernel, params):
        return _depthwise_by_taps(x, kernel, params, zero_point)
    if zero_point:
        x, params = _padded(x, params, zero_point)
    if _is_pointwise(kernel, params):
        return _pointwise_by_dot(x, kernel, params)
    if _has_few_channels(kernel, params):
        x, kernel = _with_channels(x, kernel, params, _PADDED_CHANNELS)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=params["dimension_numbers"],
        feature_group_count=params["feature_group_count"],
        preferred_element_type=jnp.int32,
    )


def _padded(
    x: jax.Array, params: Mapping[str, Any], zero_point: int
) -> tuple[jax.Array, Mapping[str, Any]]:
    """The input padded and dilated with its zero point, and the parameters that are left."""
    config = [(0, 0, 0)] * x.ndim
    spatial = params["dimension_numbers"].lhs_spec[2:]
    for axis, (low, high), dilation in zip(
        spatial, params["padding"], params["lhs_dilation"], strict=True
    ):
        config[axis] = (low, high, dilation - 1)
    rest = {"padding": ((0, 0),) * len(spatial), "lhs_dilation": (1,) * len(spatial)}
    return lax.pad(x, jnp.int8(zero_point), config), {**params, **rest}


def _is_small_depthwise(kernel: jax.Array, params: Mapping[str, Any]) -> bool:
    spec = params["dimension_numbers"].rhs_spec
    taps = math.prod(kernel.shape[a] for a in spec[2:])
    return (
        params["feature_group_count"] == kernel.shape[spec[0]]
        and kernel.shape[spec[1]] == 1
        and params["feature_group_count"] > 1
        and taps <= _MAX_TAPS
        and all(d == 1 for d in params["lhs_dilation"])
    )


def _is_pointwise(kernel: jax.Array, params: Mapping[str, Any]) -> bool:
    """True for a window of one element that stays inside the input."""
    spec = params["dimension_numbers"].rhs_spec
    return (
        params["feature_group_count"] == 1
        and all(kernel.shape[a] == 1 for a in spec[2:])
        and all(d == 1 for d in params["lhs_dilation"])
        and all(pads == (0, 0) for pads in params["padding"])
    )


def _pointwise_by_dot(x: jax.Array, kernel: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """A 1x1 convolution as a dot over the channels of the strided input."""
    spec = params["dimension_numbers"]
    strides = [1] * x.ndim
    for axis, stride in zip(spec.lhs_spec[2:], params["window_strides"], strict=True):
        strides[axis] = stride
    x = lax.slice(x, [0] * x.ndim, x.shape, strides)
    kernel = lax.squeeze(kernel, spec.rhs_spec[2:])
    channels = spec.lhs_spec[1]
    inputs = int(spec.rhs_spec[1] > spec.rhs_spec[0])
    dimension_numbers = (((channels,), (inputs,)), ((), ()))
    result = lax.dot_general(x, kernel, dimension_numbers, preferred_element_type=jnp.int32)
    # The dot leaves the other axes in order, then the output channels.
    rest = [axis for axis in range(x.ndim) if axis != channels]
    source = [*spec.lhs_spec]
    for k, axis in enumerate(spec.lhs_spec):
        source[k] = x.ndim - 1 if axis == channels else rest.index(axis)
    order = _order(tuple(source), spec.out_spec)
    return result if order == tuple(range(x.ndim)) else result.transpose(order)


def _has_few_channels(kernel: jax.Array, params: Mapping[str, Any]) -> bool:
    spec = params["dimension_numbers"].rhs_spec
    outputs, inputs = kernel.shape[spec[0]], kernel.shape[spec[1]]
    few = inputs < _FEW_CHANNELS or (inputs == _FEW_CHANNELS and outputs <= _FEW_CHANNELS)
    return params["feature_group_count"] == 1 and few


def _with_channels(
    x: jax.Array, kernel: jax.Array, params: Mapping[str, Any], channels: int
) -> tuple[jax.Array, jax.Array]:
    """The operands with zeros as further input channels."""
    spec = params["dimension_numbers"]

    def padded(value: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0, 0)] * value.ndim
        pads[axis] = (0, channels - value.shape[axis], 0)
        return lax.pad(value, jnp.int8(0), pads)

    return padded(x, spec.lhs_spec[1]), padded(kernel, spec.rhs_spec[1])


def _depthwise_by_taps(
    x: jax.Array, kernel: jax.Array, params: Mapping[str, Any], zero_point: int
) -> jax.Array:
    """Depthwise convolution with one output per channel as a sum over the taps of the window.

    XLA fuses the sum into one loop over the output.  Its own depthwise convolution is tens of times
    slower on CPU (`experiments/benchmarks/conv.py`).
    """
    spec = params["dimension_numbers"]
    spatial = spec.lhs_spec[2:]
    pads = [(0, 0, 0)] * x.ndim
    for axis, (low, high) in zip(spatial, params["padding"], strict=True):
        pads[axis] = (low, high, 0)
    padded = lax.pad(x, jnp.int8(zero_point), pads)

    sizes = [kernel.shape[a] for a in spec.rhs_spec[2:]]
    steps = list(zip(spatial, params["window_strides"], params["rhs_dilation"], strict=True))
    taps = kernel.transpose([*spec.rhs_spec[2:], spec.rhs_spec[0], spec.rhs_spec[1]])
    channels = [1] * x.ndim
    channels[spec.lhs_spec[1]] = x.shape[spec.lhs_spec[1]]
    terms = []
    for offset in itertools.product(*map(range, sizes)):
        window = padded
        for (axis, stride, dilation), at, size in zip(steps, offset, sizes, strict=True):
            span = max(0, padded.shape[axis] - (size - 1) * dilation)  # 0: the window does not fit
            start = at * dilation if span else 0
            window = lax.slice_in_dim(window, start, start + span, stride=stride, axis=axis)
        tap = taps[offset].reshape(channels)
        terms.append(window.astype(jnp.int32) * tap.astype(jnp.int32))
    total = sum(terms[1:], start=terms[0])
    order = _order(spec.lhs_spec, spec.out_spec)
    return total if order == tuple(range(x.ndim)) else total.transpose(order)


def _order(source: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation from a layout given by `source` to that of `target`."""
    order = [0] * len(source)
    for s, t in zip(source, target, strict=True):
        order[t] = s
    return tuple(order)
