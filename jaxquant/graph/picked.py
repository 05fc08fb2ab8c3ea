"""Weights that a scan picks by the number of its step: it goes over them instead.

`fori_loop(0, L, lambda i, x: jnp.tanh(x @ w[i]), x)` is a scan with a counter in its carry, and a
loop over `jnp.arange(L)` is one over the numbers.  Where the rows that are picked follow from such
numbers alone, they are known before the model runs.  Then the scan is written anew, with the rows
beside its carry, so that each step has its slice as in any scan over stacked weights.  What picks
a row twice, or by values that depend on the inputs, stays as it is.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.jax_shim import jaxprs
from jaxquant.jax_shim.jaxprs import Place

_MOST_STEPS = 4096  # of a loop whose numbers are followed
_LARGEST = 4096  # elements of a value that is followed


class _Stack(NamedTuple):
    """A parameter that all steps read alike: the position of the operand, its value."""

    position: int
    value: Any = None


class _Pick(NamedTuple):
    """Which row of an operand each slice of a scan is, and the shape in which it is picked."""

    position: int
    rows: tuple[int, ...]
    shape: tuple[int, ...]


def as_layers(
    eqn: jaxprs.JaxprEqn, is_weight: Sequence[bool], known: Sequence[np.ndarray | None]
) -> jaxprs.ClosedJaxpr | None:
    """What a scan computes, written as a scan over the rows that it picks by its numbers.

    Args:
      eqn: the scan.
      is_weight: of each operand, whether it is floats that follow from parameters.
      known: of each operand its value, where it is integers that follow from nothing; else None.

    Returns:
      A function of the same operands; None where the scan picks no rows by its numbers.
    """
    picks = _find_picks(eqn, is_weight, known)
    if not picks:
        return None
    params, body = eqn.params, eqn.params["jaxpr"]
    constants, carried = jaxprs.scan_counts(params)

    # Traced anew with the picked rows as operands of the scan: then they are stacked weights, like
    # those that a scan over layers has from the start.
    def run(*operands: Any) -> list[Any]:
        # Weights are followed as positions: their values are not known here.
        fixed = [_Stack(k, x) if is_weight[k] else x for k, x in enumerate(operands[:constants])]
        rows = {place: _rows(operands[pick.position], pick) for place, pick in picks.items()}

        def step(carry: list[Any], slices: tuple[list[Any], Mapping[Place, Any]]) -> Any:
            results = _with_rows(body, [*fixed, *carry, *slices[0]], slices[1])
            return results[:carried], results[carried:]

        start, scanned = operands[constants:][:carried], operands[constants + carried :]
        last, stacked = jax.lax.scan(
            step,
            list(start),
            (list(scanned), rows),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*last, *stacked]

    # By shapes: what is traced is a function of the same operands.
    shapes = [jax.ShapeDtypeStruct(jaxprs.shape_of(x), jaxprs.dtype_of(x)) for x in eqn.invars]
    return jax.make_jaxpr(run)(*shapes)


def _with_rows(
    body: jaxprs.ClosedJaxpr, args: Sequence[Any], rows: Mapping[Place, Any]
) -> list[Any]:
    """The results of a scan's body, with the rows that equations pick."""

    def apply(eqn: jaxprs.JaxprEqn, place: Place, operands: list[Any]) -> Sequence[Any]:
        # The picked row is in the slice already, whatever its number was.
        if place in rows:
            return [rows[place]]
        return jaxprs.bind(eqn.primitive, [_plain(x) for x in operands], dict(eqn.params))

    def enters(eqn: jaxprs.JaxprEqn, place: Place) -> bool:
        return any(inner[: len(place)] == place for inner in rows)

    found = jaxprs.interpret(body.jaxpr, body.consts, args, apply, enters)
    return [_plain(x) for x in found]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Stack) else value


def _rows(stack: jax.Array, pick: _Pick) -> jax.Array:
    """The rows of a stack that are picked, in the order of the scan's slices."""
    first, last = pick.rows[0], pick.rows[-1]
    # Neighbouring rows are a slice, which the compiler may leave in place.
    if pick.rows == tuple(range(first, last + 1)):
        rows = stack if len(pick.rows) == len(stack) else stack[first : last + 1]
    else:
        rows = stack[np.array(pick.rows)]
    return rows.reshape(len(pick.rows), *pick.shape)


def _find_picks(
    eqn: jaxprs.JaxprEqn, is_weight: Sequence[bool], known: Sequence[np.ndarray | None]
) -> dict[Place, _Pick]:
    """The equations of a scan's body that pick rows by its numbers, each row in one step."""
    params, body = eqn.params, eqn.params["jaxpr"]
    constants, carried = jaxprs.scan_counts(params)
    length = params["length"]
    if not isinstance(length, int) or not 0 < length <= _MOST_STEPS or not _may_pick(body.jaxpr):
        return {}
    # Weights as markers, so that a pick tells which operand it reads.
    fixed = [_Stack(k) if is_weight[k] else known[k] for k in range(constants)]
    steps = list(range(length))[:: -1 if params["reverse"] else 1]

    def args(carry: Sequence[Any], step: int) -> list[Any]:
        slices = [None if x is None else np.asarray(x[step]) for x in known[constants + carried :]]
        return [*fixed, *carry, *slices]

    # A carry is followed where it is known at the start and stays known.
    carry: Sequence[Any] = known[constants:][:carried]
    while True:
        behind = _Numbers(body).run(args(carry, steps[0]))[:carried]
        left = [old if new is not None else None for old, new in zip(carry, behind, strict=True)]
        if sum(x is None for x in left) == sum(x is None for x in carry):
            break
        carry = left
    numbers, followed = _Numbers(body), [x is not None for x in carry]
    for step in steps:
        behind = numbers.run(args(carry, step))[:carried]

        # As soon as no pick has all its rows known, the rest of the steps tells nothing.
        if all(None in (row for _, row, _ in seen) for seen in numbers.picked.values()):
            return {}
        carry = [x if keep else None for x, keep in zip(behind, followed, strict=True)]
    found = {}
    for place, seen in numbers.picked.items():
        row_of = dict(zip(steps, (row for _, row, _ in seen), strict=True))
        rows = tuple(row_of[step] for step in range(length))
        # Each row once: a row in two steps would be stored twice.
        if None not in rows and len(set(rows)) == length:
            position, _, shape = seen[0]
            found[place] = _Pick(position, rows, shape)
    return found


class _Numbers:
    """Evaluates the integers of a body that are known; others are None.

    Attributes:
      picked: the equations that pick rows of a stack -> for each step so far which operand, which
        row (None where it is not known), and the shape that it is picked in.
    """

    def __init__(self, body: jaxprs.ClosedJaxpr) -> None:
        self.picked: dict[Place, list[tuple[int, Any, tuple[int, ...]]]]
        self.picked = collections.defaultdict(list)
        self._body = body
        self._known: dict[Any, Sequence[Any]] = {}

    def run(self, args: Sequence[Any]) -> list[Any]:
        """One step: its results."""
        consts = [None] * len(self._body.consts)
        # Whoever asks is tracing, and these are numbers.
        with jax.ensure_compile_time_eval():
            return jaxprs.interpret(self._body.jaxpr, consts, args, self._apply, _is_plain)

    def _apply(self, eqn: jaxprs.JaxprEqn, place: Place, operands: list[Any]) -> Sequence[Any]:
        unknown = [None] * len(eqn.outvars)
        if operands and isinstance(operands[0], _Stack) and _picks_a_row(eqn):
            row = _row(eqn, operands[1:])
            shape = jaxprs.shape_of(eqn.outvars[0])
            self.picked[place].append((operands[0].position, row, shape))
            return unknown
        # Numbers that follow from the step's number are computed as numbers, step by step.
        is_known = all(isinstance(x, np.ndarray) for x in operands) and not eqn.effects
        if not is_known or not all(is_number(var.aval) for var in eqn.outvars):
            return unknown
        # Steps repeat their numbers' arithmetic: what was computed is looked up.
        key = (place, *(x.tobytes() for x in operands))
        if key not in self._known:
            results = jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
            self._known[key] = [np.asarray(x) for x in results]
        return self._known[key]


def is_number(aval: Any) -> bool:
    """True for a few integers or truth values, which are worth to be followed."""
    if not hasattr(aval, "shape") or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return False
    kind = np.dtype(aval.dtype).kind
    # Larger tensors are data; a count or a position is a few numbers.
    return (
        kind in "iub"
        and all(isinstance(n, int) for n in aval.shape)
        and (math.prod(aval.shape) <= _LARGEST)
    )


def _is_plain(eqn: jaxprs.JaxprEqn, place: Place) -> bool:
    """True for a call that may be evaluated equation by equation."""
    return not jaxprs.has_custom_derivative(eqn)


def _may_pick(jaxpr: jaxprs.Jaxpr) -> bool:
    """Whether some equation picks rows, one of a call in it too."""
    return any(
        _picks_a_row(eqn) or ((body := jaxprs.inlined_body(eqn)) is not None and _may_pick(body[0]))
        for eqn in jaxpr.eqns
    )


def _picks_a_row(eqn: jaxprs.JaxprEqn) -> bool:
    """True where one entry along the first axis of the operand is picked, whole."""
    if eqn.primitive.name not in ("dynamic_slice", "gather"):
        return False
    whole, sizes = jaxprs.shape_of(eqn.invars[0]), tuple(eqn.params["slice_sizes"])
    if not whole or sizes != (1, *whole[1:]):
        return False
    if eqn.primitive.name == "dynamic_slice":
        return True
    # A gather of one index along the first axis, as `w[i]` is with a traced i.
    numbers = eqn.params["dimension_numbers"]
    indices = jaxprs.shape_of(eqn.invars[1])
    return (
        math.prod(indices) == 1
        and tuple(numbers.start_index_map) == (0,)
        and not numbers.operand_batching_dims
    )


def _row(eqn: jaxprs.JaxprEqn, indices: Sequence[Any]) -> int | None:
    """Which row is picked; None where it is not known, or beside the operand."""
    size = jaxprs.shape_of(eqn.invars[0])[0]
    if not isinstance(indices[0], np.ndarray):
        return None
    row = int(indices[0].reshape(()))
    if eqn.primitive.name == "dynamic_slice":
        # A dynamic slice moves what would reach beyond the operand.
        return min(max(row, 0), size - 1)
    return row if 0 <= row < size else None
