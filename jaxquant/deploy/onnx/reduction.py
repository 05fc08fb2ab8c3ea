"""Reductions along axes and over windows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import elementwise
from jaxquant.deploy.onnx.builder import Builder

_REDUCTIONS = {
    "reduce_and": "ReduceMin",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_or": "ReduceMax",
    "reduce_prod": "ReduceProd",
    "reduce_sum": "ReduceSum",
}
_LOGICAL = frozenset({"reduce_and", "reduce_or"})
# Truth values, and what runtimes have no sums of, are reduced as whole numbers of these types.
_WIDER = {"bool": "int32", "int8": "int32", "uint8": "int32", "uint32": "int64"}
_INDICES = {"argmax": "ArgMax", "argmin": "ArgMin"}
_AXES_AS_INPUT = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18, "ReduceProd": 18}
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
# What ONNX has no operator for: the operator of two elements, and what it leaves as they are.
_CUMULATIVE = {"cummax": ("Max", -np.inf), "cummin": ("Min", np.inf), "cumprod": ("Mul", 1.0)}
OPERATIONS = frozenset((*_REDUCTIONS, *_INDICES, *_WINDOWS, *_CUMULATIVE, "cumsum"))


def emit(
    builder: Builder,
    node: Node,
    value: Value,
    shape: tuple[Size, ...],
    dtype: str = "float32",
    is_int8: bool = False,
) -> Value:
    """The result of a reduction.

    Args:
      builder: of the graph.
      node: the operation.
      value: its operand.
      shape: of the result.
      dtype: of the operand.
      is_int8: the operand is dequantized, and a runtime may compute on its integers.
    """
    if node.op in _WINDOWS:
        return _window(builder, node, value, shape)
    if node.op in _INDICES:
        return _index(builder, node, value, shape, dtype)
    if node.op in _CUMULATIVE:
        if dtype != "float32":
            raise NotCovered(f"the operation {node.op!r} on {dtype}")
        return _cumulative(builder, node, value)
    if node.op == "cumsum":
        value = builder.plain(value)
        axis = builder.constant(np.int64(value.axis(node.params["axis"])))
        reverse = int(bool(node.params.get("reverse")))
        name = builder.node("CumSum", [value.name, axis], reverse=reverse)
        return dataclasses.replace(value, name=name)
    if node.op in _LOGICAL and dtype != "bool":
        raise NotCovered(f"the operation {node.op!r} on {dtype}")
    # ONNX reduces no small integers, so they are widened on the way.
    if dtype in _WIDER:
        found = _reduce(
            builder, node, elementwise.cast(builder, value, _WIDER[dtype]), shape, is_int8
        )
        return elementwise.cast(builder, found, dtype)
    return _reduce(builder, node, value, shape, is_int8)


def _cumulative(builder: Builder, node: Node, value: Value) -> Value:
    """Over 2, 4, 8, ... elements: each round meets what it has with itself, so far moved on."""
    op, neutral = _CUMULATIVE[node.op]
    value, axis = builder.plain(value), node.params["axis"]
    size, at = value.shape[axis], value.axis(axis)
    if not isinstance(size, int):
        raise NotCovered(f"the operation {node.op!r} along an axis whose size varies")
    name, reverse, reach = value.name, bool(node.params.get("reverse")), 1
    fill = builder.constant(np.float32(neutral), "neutral")
    # So many rounds, the logarithm of the size, instead of one for each element.
    while reach < size:
        # ONNX's pads are those before of all axes, then those behind.
        pads = [0] * (2 * value.rank)
        pads[at + (value.rank if reverse else 0)] = reach
        moved = builder.node("Pad", [name, builder.ints(pads), fill], mode="constant")
        ends = ([reach], [reach + size]) if reverse else ([0], [size])
        moved = builder.node("Slice", [moved, *map(builder.ints, (*ends, [at]))])
        name, reach = builder.node(op, [name, moved]), 2 * reach
    return dataclasses.replace(value, name=name)


def _reduce(
    builder: Builder, node: Node, value: Value, shape: tuple[Size, ...], is_int8: bool
) -> Value:
    axes = tuple(node.params["axes"])
    order = _remaining(value, axes)
    sizes = [value.shape[axis] for axis in axes]
    pooled = node.op == "reduce_sum" and value.order[2:] and set(value.order[2:]) == set(axes)
    # [B, T, C] over its last axis holds features: no positions, which a float pool would be for.
    are_positions = is_int8 or value.rank > 3 or value.order != straight(value.rank)
    if pooled and are_positions and all(isinstance(size, int) for size in sizes):
        # The form of it that runtimes have an int8 kernel for.
        name = builder.node("GlobalAveragePool", [value.name])
        name = builder.node("Flatten", [name], axis=1)
        factor = value.factor * math.prod(size for size in sizes if isinstance(size, int))
        return Value(name, shape, order, factor)
    value = builder.plain(value)
    physical = [value.axis(axis) for axis in axes]
    return Value(_along(builder, _REDUCTIONS[node.op], value.name, physical), shape, order)


def _along(builder: Builder, op: str, name: str, axes: list[int]) -> str:
    # Of newer operators the axes are an input.
    if builder.opset >= _AXES_AS_INPUT[op]:
        return builder.node(op, [name, builder.ints(axes)], keepdims=0)
    return builder.node(op, [name], axes=axes, keepdims=0)


def _remaining(value: Value, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The physical order once some logical axes are gone."""
    kept = [axis for axis in range(value.rank) if axis not in axes]
    return tuple(kept.index(axis) for axis in value.order if axis not in axes)


def _index(
    builder: Builder, node: Node, value: Value, shape: tuple[Size, ...], given: str
) -> Value:
    value = builder.plain(value)
    # Runtimes find no largest of these types.
    if given in _WIDER:
        value = elementwise.cast(builder, value, _WIDER[given])
    (axis,) = node.params["axes"]
    name = builder.node(_INDICES[node.op], [value.name], axis=value.axis(axis), keepdims=0)
    result = Value(name, shape, _remaining(value, (axis,)))
    dtype = elementwise.onnx_dtype(str(node.params["index_dtype"]))
    return result if dtype == "int64" else elementwise.cast(builder, result, dtype)


def _window(builder: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """Pooling: windows along the axes behind the first two."""
    windows, strides = node.params["window_dimensions"], node.params["window_strides"]
    padding, dilation = node.params["padding"], node.params["window_dilation"]
    if any(d != 1 for d in node.params["base_dilation"]):
        raise NotCovered("a window over a dilated tensor")
    settings = list(zip(windows, strides, map(tuple, padding), strict=True))
    # Pooling is along all but two axes in ONNX, which have to come first.
    plain = [axis for axis, setting in enumerate(settings) if setting == (1, 1, (0, 0))]
    if len(plain) < 2:
        raise NotCovered("windows along more than all but two axes")
    if not set(value.order[:2]) <= set(plain):
        batch, channels = plain[0], plain[-1]
        rest = [axis for axis in range(value.rank) if axis not in (batch, channels)]
        value = builder.ordered(value, (batch, channels, *rest))
    axes = value.order[2:]
    attributes: dict[str, Any] = {
        "kernel_shape": [windows[axis] for axis in axes],
        "strides": [strides[axis] for axis in axes],
        "pads": [padding[axis][0] for axis in axes] + [padding[axis][1] for axis in axes],
    }

    # Written only where they are: older opsets have no such attribute.
    if any(dilation[axis] != 1 for axis in axes):
        attributes["dilations"] = [dilation[axis] for axis in axes]
    if node.op == "reduce_window_sum":
        return _window_sum(builder, value, attributes, shape)
    value = builder.plain(value)
    name = value.name
    # ONNX has no pool of the smallest.
    if node.op == "reduce_window_min":
        name = builder.node("Neg", [name])
    name = builder.node("MaxPool", [name], **attributes)
    if node.op == "reduce_window_min":
        name = builder.node("Neg", [name])
    return dataclasses.replace(value, name=name, shape=shape)


def _window_sum(
    builder: Builder, value: Value, attributes: dict[str, Any], shape: tuple[Size, ...]
) -> Value:
    if "dilations" in attributes and builder.opset < 19:
        raise NotCovered("the sum of a dilated window before opset 19")
    # Padding is counted, as the zeros that a sum meets.
    name = builder.node("AveragePool", [value.name], count_include_pad=1, **attributes)
    factor = value.factor * math.prod(attributes["kernel_shape"])
    return Value(name, shape, value.order, factor)
