"""Embeddings: rows of a table of integers, dequantized behind the lookup."""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxquant.deploy.lower.stored import Stored
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.network import Node
from jaxquant.deploy.onnx import elementwise, indexing
from jaxquant.deploy.onnx.builder import Builder


def look_up(
    builder: Builder,
    node: Node,
    table: Stored,
    indices: Value,
    shape: tuple[Size, ...],
    is_unsigned: bool,
) -> Value:
    """Rows of a table [V, K].

    Args:
      builder: of the graph.
      node: a gather, with what is done with an index out of range.
      table: what is stored.
      indices: those of the rows.
      shape: of the result.
      is_unsigned: the table is in the file as uint8, 128 more, as a dot reads it.
    """
    width = table.shape[1]
    (length,) = table.layout.shape[1:]
    scale = np.ascontiguousarray(table.scale)

    # What is out of range comes by way of the scales, where it is NaN: integers have none.
    clipped = {**node.params, "mode": "CLIP", "fill_value": None}
    if table.bits == 4:
        rows = _rows(builder, node, clipped, _packed(table.integers), indices, shape)
        values = _unpacked(builder, rows, width)
    else:
        # A tied head reads the same array, which is in the file once.
        offset = 128 if is_unsigned else 0
        shifted = table.integers.astype(np.int16) + offset
        integers = shifted.astype(np.uint8 if is_unsigned else np.int8)
        rows = _rows(builder, node, clipped, integers, indices, shape)
        # With a scale of 1: the scales of rows come behind.
        inputs = [rows.name, builder.constant(np.float32(1), "one")]
        inputs += [builder.constant(np.uint8(offset), "zero_point")] if is_unsigned else []
        values = dataclasses.replace(rows, name=builder.node("DequantizeLinear", inputs, "rows"))
    units = _rows(builder, node, dict(node.params), scale, indices, shape)
    if table.layout.groups > 1:
        group = builder.constant(np.arange(length) // table.layout.size, "group")
        name = builder.node("Gather", [units.name, group], axis=units.axis(units.rank - 1))
        units = dataclasses.replace(units, name=name, shape=values.shape)
    return elementwise.apply(builder, "Mul", [values, units])


def _rows(
    builder: Builder,
    node: Node,
    params: dict[str, object],
    array: np.ndarray,
    indices: Value,
    shape: tuple[Size, ...],
) -> Value:
    """The rows of an array [V, any]."""
    sizes = (*shape[:-1], array.shape[1])
    gather = dataclasses.replace(
        node, op="gather", params={**params, "slice_sizes": (1, array.shape[1])}
    )
    table = Value(builder.constant(array, "table"), array.shape, (0, 1))
    # As any gather of rows, with what the model says of indices out of range.
    emit = indexing.TABLE["gather"]
    (rows,) = emit(builder, gather, [table, indices], [sizes], [str(array.dtype), "int32"])
    return rows


def _packed(integers: np.ndarray) -> np.ndarray:
    """Two integers of four bits a byte, each with 8 added: uint8 [V, K / 2], rounded up."""
    digits = (integers + 8).astype(np.uint8)
    # An odd row gets a digit behind it that nobody reads.
    digits = np.pad(digits, ((0, 0), (0, digits.shape[1] % 2)))
    packed: np.ndarray = digits[:, ::2] | (digits[:, 1::2] << 4)
    return packed


def _unpacked(builder: Builder, rows: Value, width: int) -> Value:
    """The integers of packed rows in float, by a table of what every byte holds."""
    byte = np.arange(256)
    pairs = np.stack([byte & 15, byte >> 4], axis=-1).astype(np.float32) - 8
    # The pairs are behind the last axis, so that the rows have to be in order.
    rows = builder.ordered(rows, tuple(range(rows.rank)))
    index = builder.node("Cast", [rows.name], to=elementwise.ONNX_TYPES["int32"])
    name = builder.node("Gather", [builder.constant(pairs, "pairs"), index], axis=0)
    sizes: list[Size] = [*rows.shape[:-1], 2 * int(rows.shape[-1])]
    name = builder.reshape(name, [*rows.shape, 2], sizes)
    if width % 2:
        name = builder.node("Slice", [name, *map(builder.ints, ([0], [width], [rows.rank - 1]))])
    return Value(name, (*rows.shape[:-1], width), tuple(range(rows.rank)))
