"""Operators that JAX has no primitive for: `jaxquant.graph.operators` finds their equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx.builder import Builder

# The first opset with the operator of a kind; without it the model's own operations are written.
SINCE: Mapping[str, int] = {"gelu": 20, "layer_norm": 17, "softmax": 13}


def _gelu(builder: Builder, node: Node, x: Sequence[Value]) -> Value:
    value = builder.plain(x[0])
    name = builder.node("Gelu", [value.name], approximate=node.params["approximate"])
    return dataclasses.replace(value, name=name)


def _layer_norm(builder: Builder, node: Node, x: Sequence[Value]) -> Value:
    axis, vectors = node.params["axis"], list(x[1:])
    # It normalizes the last axes in memory.
    value = builder.ordered(x[0], (*(a for a in x[0].order if a != axis), axis))
    # The operator asks for a scale.
    ones = builder.constant(np.ones(int(value.shape[axis]), np.float32), "ones")
    scale = builder.plain(vectors.pop(0)).name if node.params["has_scale"] else ones
    names = [value.name, scale, *(builder.plain(vector).name for vector in vectors)]
    epsilon = float(node.params["epsilon"])
    name = builder.node("LayerNormalization", names, axis=-1, epsilon=epsilon)
    return dataclasses.replace(value, name=name)


def _softmax(builder: Builder, node: Node, x: Sequence[Value]) -> Value:
    value = builder.plain(x[0])
    name = builder.node("Softmax", [value.name], axis=value.axis(node.params["axis"]))
    return dataclasses.replace(value, name=name)


TABLE: Mapping[str, Callable[[Builder, Node, Sequence[Value]], Value]] = {
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
}
