"""Which rows of a result a NaN in some row of an operand reaches, where an equation moves rows.

What int8 hides is not in the operand itself: a mark [N] tells which of its N rows are NaN, and goes
through the equation in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir
from jaxquant.graph.rows import Rows, axis_of, is_whole, rows_along
from jaxquant.run.nonfinite import each_entry

# Gives the value of an index or the like that an equation reads.
Read: TypeAlias = Callable[[ir.Atom], Any]


class Move(NamedTuple):
    """How the rows of an operand become those of a result.

    Attributes:
      rows: those of the result.
      run: (the mark of the operand's rows [N], `Read`) -> that of the result's [M].
    """

    rows: Rows
    run: Callable[[jax.Array, Read], jax.Array]


class _Moving(NamedTuple):
    """An operand of an equation whose rows are moved along an axis; the number is the result's."""

    graph: ir.Graph
    eqn: ir.Equation
    operand: int
    axis: int
    number: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.graph.shape(self.eqn.inputs[self.operand])

    @property
    def result(self) -> tuple[int, ...]:
        return self.graph.shape(self.eqn.outputs[self.number])


def find_move(
    graph: ir.Graph, eqn: ir.Equation, operand: int, rows: Rows, number: int
) -> Move | None:
    """How the rows of an operand move to a result; None where that is not known.

    Args:
      graph: the traced model.
      eqn: an equation of it.
      operand: the number of the operand.
      rows: its rows.
      number: that of the result.
    """
    find = _contracted if eqn.index in graph.contractions else _MOVES.get(eqn.name)
    move = find(_Moving(graph, eqn, operand, axis_of(rows), number)) if find else None
    if move is None or is_whole(rows):
        return move
    run = move.run  # of each entry along the axis, of which a row has several
    return move._replace(run=lambda value, read: run(each_entry(value, rows), read))


def _along(given: _Moving, run: Callable[[jax.Array], jax.Array], axis: int | None = None) -> Move:
    """A move that reads no value, to an axis of the result: the same one if none is given."""
    place = given.axis if axis is None else axis
    return Move(rows_along(given.result, place), lambda value, read: run(value))


def _reversed(given: _Moving) -> Move:
    return _along(given, lambda value: value[::-1])


def _sliced(given: _Moving) -> Move:
    params, k = given.eqn.params, given.axis
    stride = 1 if params["strides"] is None else params["strides"][k]
    low, high = params["start_indices"][k], params["limit_indices"][k]
    return _along(given, lambda value: lax.slice(value, (low,), (high,), (stride,)))


def _split(given: _Moving) -> Move:
    sizes = given.eqn.params["sizes"]
    low = sum(sizes[: given.number])
    return _along(given, lambda value: value[low : low + sizes[given.number]])


def _concatenated(given: _Moving) -> Move:
    sizes = [given.graph.shape(x)[given.axis] for x in given.eqn.inputs]
    around = sum(sizes[: given.operand]), sum(sizes[given.operand + 1 :]), 0
    return _along(given, lambda value: lax.pad(value, jnp.bool_(False), [around]))


def _padded(given: _Moving) -> Move | None:
    if given.operand != 0:
        return None
    pads = given.eqn.params["padding_config"][given.axis]
    return _along(given, lambda value: lax.pad(value, jnp.bool_(False), [pads]))


def _dynamically_sliced(given: _Moving) -> Move:
    start, size = given.eqn.inputs[1 + given.axis], given.result[given.axis]

    def run(value: jax.Array, read: Read) -> jax.Array:
        return lax.dynamic_slice(value, (read(start),), (size,))

    return Move(rows_along(given.result, given.axis), run)


def _updated(given: _Moving) -> Move:
    start, size = given.eqn.inputs[2 + given.axis], given.result[given.axis]

    def run(value: jax.Array, read: Read) -> jax.Array:
        if given.operand == 0:  # what else a row holds stays
            return value
        return lax.dynamic_update_slice(jnp.zeros(size, bool), value, (read(start),))

    return Move(rows_along(given.result, given.axis), run)


def _gathered(given: _Moving) -> Move | None:
    """Whole rows by their index: the first axis of the indices tells them apart."""
    params, sizes, axis = given.eqn.params, given.sizes, given.axis
    numbers = params["dimension_numbers"]
    places = given.graph.shape(given.eqn.inputs[1])[:-1]
    outside = [k for k in range(len(given.result)) if k not in numbers.offset_dims]
    are_rows = (
        given.operand == 0
        and tuple(numbers.start_index_map) == (axis,)
        and tuple(numbers.collapsed_slice_dims) == (axis,)
        and not numbers.operand_batching_dims
        and all(k == axis or n == sizes[k] for k, n in enumerate(params["slice_sizes"]))
    )
    if not are_rows or not places:
        return None
    of_marks = lax.GatherDimensionNumbers((), (0,), (0,))

    def run(value: jax.Array, read: Read) -> jax.Array:
        found = lax.gather(
            value.astype(jnp.float32), read(given.eqn.inputs[1]), of_marks, (1,),
            mode=params["mode"], fill_value=0.0,
        )  # fmt: skip
        return (found.astype(bool)).any(axis=tuple(range(1, len(places))))

    return Move(rows_along(given.result, outside[0]), run)


def _pooled(given: _Moving) -> Move:
    params, k = given.eqn.params, given.axis
    window = (
        params["window_dimensions"][k],
        params["window_strides"][k],
        params["padding"][k],
        params["base_dilation"][k],
        params["window_dilation"][k],
    )
    return _along(given, lambda value: _reached(value, *window))


def _contracted(given: _Moving) -> Move | None:
    """A convolution along the rows; what is summed over all of them reaches every row."""
    contraction = given.graph.contractions[given.eqn.index]
    own, kernel = contraction.operands
    window = contraction.window
    if window is None or given.operand != 0 or given.axis not in own.window:
        return None
    place = own.window.index(given.axis)
    size = given.graph.shape(given.eqn.inputs[1])[kernel.window[place]]
    slides = (
        window.strides[place],
        window.padding[place],
        window.input_dilation[place],
        window.dilation[place],
    )
    result = contraction.result.window[place]
    return _along(given, lambda value: _reached(value, size, *slides), result)


def _reached(
    value: jax.Array, size: int, stride: int, pads: tuple[int, int], dilation: int, window: int
) -> jax.Array:
    """The positions whose window holds a marked row; the last two are dilations."""
    reached = lax.reduce_window(
        value.astype(jnp.float32), 0.0, lax.max, (size,), (stride,), (pads,), (dilation,), (window,)
    )
    return reached.astype(bool)


def _reshaped(given: _Moving) -> Move | None:
    """Rows that are cut into rows of rows: the slower index tells them apart."""
    sizes, result, axis = given.sizes, given.result, given.axis
    ahead = math.prod(sizes[:axis])
    places = [k for k, n in enumerate(result) if math.prod(result[:k]) == ahead and n != 1]
    if not places or given.eqn.params.get("dimensions") is not None:
        return None
    place = places[0]
    rows = result[place]
    if not isinstance(sizes[axis], int) or not isinstance(rows, int) or sizes[axis] % rows:
        return None
    return _along(given, lambda value: value.reshape(rows, -1).any(axis=1), place)


_MOVES: Mapping[str, Callable[[_Moving], Move | None]] = {
    "concatenate": _concatenated,
    "dynamic_slice": _dynamically_sliced,
    "dynamic_update_slice": _updated,
    "gather": _gathered,
    "pad": _padded,
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _pooled),
    "reshape": _reshaped,
    "rev": _reversed,
    "slice": _sliced,
    "split": _split,
}
