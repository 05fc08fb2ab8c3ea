"""Primitives that pick by index: lookups of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from jaxquant.deploy.litert import elementwise
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Size, Value, straight
from jaxquant.deploy.network import Node


def _gather(builder: Builder, node: Node, x: list[Value], shape: tuple[Size, ...]) -> Value:
    """Whole rows along one axis, by an index for each: `table[indices]`.

    The runtime has no index out of range: what JAX does there is not in the file.
    """
    table, indices = builder.plain(x[0]), builder.ordered(x[1], straight(x[1].rank))
    numbers, sizes = node.params["dimension_numbers"], list(node.params["slice_sizes"])
    # A gather of XLA is far more general; indexing by an array gives this one form.
    axes = list(numbers["start_index_map"])
    if len(axes) != 1 or list(numbers["collapsed_slice_dims"]) != axes or sizes[axes[0]] != 1:
        raise NotCovered("a gather of other than whole rows along one axis")
    (axis,) = axes

    # The axes of the indices stand where the axis that they index stood.
    places = range(axis, axis + indices.rank - 1)
    offsets = [a for a in range(len(shape)) if a not in places]
    whole = [1 if a == axis else size for a, size in enumerate(table.shape)]
    is_plain = sizes == whole and not numbers["operand_batching_dims"]
    if not is_plain or sorted(numbers["offset_dims"]) != offsets:
        raise NotCovered("a gather of other than whole rows along one axis")
    table = builder.ordered(table, straight(table.rank))

    # The last axis of the indices is that of the coordinates, of which there is one.
    rows = builder.reshape(elementwise.cast(builder, indices, "int32"), indices.shape[:-1])
    # An index that is the same for all samples picks one row for all of them.
    picked = (*table.shape[:axis], *indices.shape[:-1], *table.shape[axis + 1 :])
    arrays = builder.array(table.name), builder.array(rows)
    if arrays[0] is not None and arrays[1] is not None:
        return builder.named(np.take(arrays[0], arrays[1], axis), "rows")
    name = builder.alike("GATHER", table, [rows], picked, "GatherOptions", Axis=axis)
    return Value(name, picked, straight(len(shape)))


TABLE: Mapping[str, Callable[[Builder, Node, list[Value], tuple[Size, ...]], Value]] = {
    "gather": _gather,
}
