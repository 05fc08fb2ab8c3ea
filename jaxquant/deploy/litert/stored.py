"""Weights that are stored as integers and read in float, and tables of which rows are looked up.

A weight is int8 in the file, with a `DEQUANTIZE` behind it that runtimes do once, when they load
the file.  LiteRT's kernels of floats and int8 weights ("hybrid") quantize the floats as well, which
`qapply` does not.
"""

from __future__ import annotations

import numpy as np

from jaxquant.deploy.litert import contraction, elementwise
from jaxquant.deploy.litert.builder import Builder
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.lower.convolution import ConvForm
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.stored import Stored
from jaxquant.deploy.lower.values import Value, straight


def matrix(builder: Builder, stored: Stored, channels: tuple[int, ...]) -> str:
    """The weight of a dense layer in float: [N, K], N the axes `channels`."""
    integers, scale = _of_channels(stored, channels)
    return _dequantize(builder, integers.T, Grid(scale, 0, 0))


def kernel(builder: Builder, stored: Stored, form: ConvForm) -> str:
    """The kernel of a convolution in float, in the runtime's layout."""
    integers, scale = _of_channels(stored, (form.outputs,))
    array, axis = contraction.kernel(form, _in_place(stored, integers, (form.outputs,)))
    return _dequantize(builder, array, Grid(scale, 0, axis))


def dequantized(builder: Builder, stored: Stored) -> Value:
    """The weight in float, in the model's own axes."""
    channels = tuple(axis for axis in range(len(stored.shape)) if axis not in stored.summed)
    integers, scale = _of_channels(stored, channels)
    wide = [axis for axis in channels if stored.shape[axis] != 1]
    array = _in_place(stored, integers, channels)
    order = straight(array.ndim)
    # A grid has scales along one axis; several axes of channels take a product instead.
    if len(wide) <= 1:
        grid = Grid(scale, 0, wide[0] if wide else 0)
        return Value(_dequantize(builder, array, grid), stored.shape, order)
    value = Value(_dequantize(builder, array, Grid.of(1.0, 0)), stored.shape, order)
    along = [size if axis in channels else 1 for axis, size in enumerate(stored.shape)]
    return elementwise.apply(
        builder, "MUL", [value, builder.named(scale.reshape(along), "weight_scale")]
    )


def look_up(builder: Builder, table: Stored, indices: Value) -> Value:
    """Rows of an int8 table [V, K], each times its scale: float.

    An index that is the same for all samples picks one row for all of them.
    """
    integers, scale = table.integers, np.ascontiguousarray(table.scale)
    if table.bits != 8 or scale.shape[1] != 1:
        raise _groups(table)
    places = elementwise.cast(builder, builder.ordered(indices, straight(indices.rank)), "int32")
    flat = builder.reshape(places, indices.shape[:-1])
    # Positions are mostly known when the model is exported: then their rows are.
    if (known := builder.array(flat)) is not None:
        return builder.named(integers[known] * scale[known], "rows")

    def rows(array: np.ndarray) -> Value:
        shape = (*indices.shape[:-1], array.shape[1])
        names = [builder.constant(array, "table"), flat]
        dtype = str(array.dtype)
        name = builder.op("GATHER", names, shape, dtype, None, "GatherOptions", Axis=0)
        return Value(name, shape, straight(len(shape)))

    # Integers first, then times the scale of the row: a table in float would be four times as
    # large.
    return elementwise.apply(
        builder, "MUL", [elementwise.cast(builder, rows(integers), "float32"), rows(scale)]
    )


def _of_channels(stored: Stored, channels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The integers [K, N] and the scales [N]."""
    # The runtime has int8 weights with a scale for each channel alone.
    integers, scale = stored.matrix(channels)
    if stored.bits != 8 or len(scale) != 1:
        raise _groups(stored)
    return integers, np.ascontiguousarray(scale[0], np.float32)


def _in_place(stored: Stored, integers: np.ndarray, channels: tuple[int, ...]) -> np.ndarray:
    """A matrix [K, N] as the weight that it is of, in the model's own axes."""
    axes = (*stored.summed, *channels)
    apart = integers.reshape([stored.shape[axis] for axis in axes])
    return apart.transpose([axes.index(axis) for axis in range(len(axes))])


def _dequantize(builder: Builder, integers: np.ndarray, grid: Grid) -> str:
    return builder.op("DEQUANTIZE", [builder.constant(integers, "weight", grid)], integers.shape)


def _groups(stored: Stored) -> NotCovered:
    what = f"{stored.bits} bits" if stored.bits != 8 else f"groups of {stored.layout.size}"
    return NotCovered(
        f"a weight of {what} (LiteRT has int8 weights with a scale for each channel: quantize "
        "without weight_bits and group_size)"
    )
