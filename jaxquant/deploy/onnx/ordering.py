"""Primitives that put in order: sort and top_k, both TopK, whose ties keep their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import elementwise
from jaxquant.deploy.onnx import whole_numbers as whole
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.indexing import Emit, Shapes

_SORTED = ("float32", "int32", "int64")  # what runtimes sort


def _sort(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    """Sort all operands along an axis by the first `num_keys` of them, the first counting most.

    TopK keeps equals in order, so sorting by the last key first, then by the one before, ...,
    gives that.
    """
    axis, keys = node.params["dimension"], node.params["num_keys"]
    order = x[0].order
    names = [builder.ordered(value, order).name for value in x]
    along, size = x[0].axis(axis), whole.name_of(builder, whole.of_size(builder, x[0].shape[axis]))
    if len(x) == 1 and dtypes[0] in _SORTED:
        sorted_, _ = builder.split_node("TopK", [names[0], size], 2, axis=along, largest=0)
        return [Value(sorted_, shapes[0], order)]
    # By the last key first, each sort keeping the order of the one before where it is equal.
    permutation = ""
    for name, dtype in reversed(list(zip(names[:keys], dtypes, strict=False))):
        key = (
            name
            if dtype in _SORTED
            else builder.node("Cast", [name], to=elementwise.ONNX_TYPES["int32"])
        )
        if permutation:
            key = builder.node("GatherElements", [key, permutation], axis=along)
        _, found = builder.split_node("TopK", [key, size], 2, axis=along, largest=0)
        if permutation:
            found = builder.node("GatherElements", [permutation, found], axis=along)

        # What is known of the order so far is applied to each operand alike.
        permutation = found
    return [
        Value(builder.node("GatherElements", [name, permutation], axis=along), shape, order)
        for name, shape in zip(names, shapes, strict=True)
    ]


def _top_k(
    builder: Builder, node: Node, x: list[Value], shapes: Shapes, dtypes: Sequence[str]
) -> list[Value]:
    value = builder.plain(x[0])
    axis = node.params.get("axis", value.rank - 1)
    name = value.name
    # TopK sorts few types: the others go through int32 and come back.
    if dtypes[0] not in _SORTED:
        name = builder.node("Cast", [name], to=elementwise.ONNX_TYPES["int32"])
    inputs = [name, builder.ints([node.params["k"]])]
    values, indices = builder.split_node("TopK", inputs, 2, axis=value.axis(axis), largest=1)
    if dtypes[0] not in _SORTED:
        values = builder.node("Cast", [values], to=elementwise.ONNX_TYPES[dtypes[0]])
    indices = builder.node("Cast", [indices], to=elementwise.ONNX_TYPES["int32"])
    return [
        dataclasses.replace(value, name=name, shape=shape)
        for name, shape in zip((values, indices), shapes, strict=True)
    ]


TABLE: dict[str, Emit] = {"sort": _sort, "top_k": _top_k}
