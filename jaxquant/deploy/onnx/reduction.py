"""Reductions along axes and over windows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import elementwise
from jaxquant.deploy.onnx.builder import Builder, NotCovered, Size, Value

_REDUCTIONS = {
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_sum": "ReduceSum",
}
_INDICES = {"argmax": "ArgMax", "argmin": "ArgMin"}
_AXES_AS_INPUT = {"ReduceSum": 13, "ReduceMax": 18, "ReduceMin": 18, "ReduceProd": 18}
_WINDOWS = ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
OPERATIONS = frozenset((*_REDUCTIONS, *_INDICES, *_WINDOWS, "cumsum"))


def emit(b: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """The result of a reduction; `shape` is that of the result."""
    if node.op in _WINDOWS:
        return _window(b, node, value, shape)
    if node.op in _INDICES:
        return _index(b, node, value, shape)
    if node.op == "cumsum":
        value = b.plain(value)
        axis = b.constant(np.int64(value.axis(node.params["axis"])))
        reverse = int(bool(node.params.get("reverse")))
        name = b.node("CumSum", [value.name, axis], reverse=reverse)
        return dataclasses.replace(value, name=name)
    return _reduce(b, node, value, shape)


def _reduce(b: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    axes = tuple(node.params["axes"])
    order = _remaining(value, axes)
    sizes = [value.shape[axis] for axis in axes]
    pooled = node.op == "reduce_sum" and value.order[2:] and set(value.order[2:]) == set(axes)
    if pooled and all(isinstance(size, int) for size in sizes):
        # The form of it that runtimes have an int8 kernel for.
        name = b.node("GlobalAveragePool", [value.name])
        name = b.node("Flatten", [name], axis=1)
        factor = value.factor * math.prod(size for size in sizes if isinstance(size, int))
        return Value(name, shape, order, factor)
    value = b.plain(value)
    name = _along(b, _REDUCTIONS[node.op], value.name, [value.axis(axis) for axis in axes])
    return Value(name, shape, order)


def _along(b: Builder, op: str, name: str, axes: list[int]) -> str:
    if b.opset >= _AXES_AS_INPUT[op]:
        return b.node(op, [name, b.ints(axes)], keepdims=0)
    return b.node(op, [name], axes=axes, keepdims=0)


def _remaining(value: Value, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The physical order once some logical axes are gone."""
    kept = [axis for axis in range(value.rank) if axis not in axes]
    return tuple(kept.index(axis) for axis in value.order if axis not in axes)


def _index(b: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    value = b.plain(value)
    (axis,) = node.params["axes"]
    name = b.node(_INDICES[node.op], [value.name], axis=value.axis(axis), keepdims=0)
    result = Value(name, shape, _remaining(value, (axis,)))
    dtype = elementwise.onnx_dtype(str(node.params["index_dtype"]))
    return result if dtype == "int64" else elementwise.cast(b, result, dtype)


def _window(b: Builder, node: Node, value: Value, shape: tuple[Size, ...]) -> Value:
    """Pooling: windows along the axes behind the first two."""
    windows, strides = node.params["window_dimensions"], node.params["window_strides"]
    padding, dilation = node.params["padding"], node.params["window_dilation"]
    if any(d != 1 for d in node.params["base_dilation"]):
        raise NotCovered("a window over a dilated tensor")
    settings = list(zip(windows, strides, map(tuple, padding), strict=True))
    plain = [axis for axis, setting in enumerate(settings) if setting == (1, 1, (0, 0))]
    if len(plain) < 2:
        raise NotCovered("windows along more than all but two axes")
    if not set(value.order[:2]) <= set(plain):
        batch, channels = plain[0], plain[-1]
        rest = [axis for axis in range(value.rank) if axis not in (batch, channels)]
        value = b.ordered(value, (batch, channels, *rest))
    axes = value.order[2:]
    attributes: dict[str, Any] = {
        "kernel_shape": [windows[axis] for axis in axes],
        "strides": [strides[axis] for axis in axes],
        "pads": [padding[axis][0] for axis in axes] + [padding[axis][1] for axis in axes],
    }
    if any(dilation[axis] != 1 for axis in axes):
        attributes["dilations"] = [dilation[axis] for axis in axes]
    if node.op == "reduce_window_sum":
        return _window_sum(b, value, attributes, shape)
    value = b.plain(value)
    name = value.name
    if node.op == "reduce_window_min":
        name = b.node("Neg", [name])
    name = b.node("MaxPool", [name], **attributes)
    if node.op == "reduce_window_min":
        name = b.node("Neg", [name])
    return dataclasses.replace(value, name=name, shape=shape)


def _window_sum(
    b: Builder, value: Value, attributes: dict[str, Any], shape: tuple[Size, ...]
) -> Value:
    if "dilations" in attributes and b.opset < 19:
        raise NotCovered("the sum of a dilated window before opset 19")
    name = b.node("AveragePool", [value.name], count_include_pad=1, **attributes)
    factor = value.factor * math.prod(attributes["kernel_shape"])
    return Value(name, shape, value.order, factor)
