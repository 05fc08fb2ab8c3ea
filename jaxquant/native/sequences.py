"""Several convolutions in one native call, each of which may read what those before it gave.

What lies between them never becomes an array of XLA's: a thread takes a few samples of the batch
through several of them while their tensors stay in its cache, in memory that it keeps from call to
call (`src/sequence.h`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxquant.native import library
from jaxquant.native.call import Static, call
from jaxquant.native.fields import NONE, Image, Places
from jaxquant.native.fused import (
    BIAS,
    INV_SCALE,
    MULTIPLIER,
    PACKED,
    RESIDUAL,
    RESIDUAL_SCALE,
    ZERO_POINTS,
    Call,
    X,
)


class Link(NamedTuple):
    """A result of an earlier call of the sequence, in the place of an array.

    Attributes:
      call: the position of the call.
      result: which of its results.
      shape, dtype: of the result.
    """

    call: int
    result: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)


def sequence(calls: Sequence[Call], results: Sequence[tuple[int, int]]) -> tuple[jax.Array, ...]:
    """Run calls of `conv_call` as one.

    Args:
      calls: in order; x and the residual of one may be a `Link` to the result of an earlier one.
        Between two calls an int8 tensor is int8, not uint8.
      results: (call, result) of those that are wanted.

    Returns:
      the wanted results, with the bits that the calls give one by one.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: a call is no convolution of int8.
    """
    library.require()
    operands: list[Any] = []
    batched: list[int] = []
    taken: list[list[int | Link]] = []  # what every call takes: places among the operands, links
    for each in calls:
        # uint8 tensors are what XLA hands in; between calls of a sequence nothing is converted.
        dtypes = {jnp.dtype(x.dtype).name for x in (each.operands[X], *each.operands[RESIDUAL:])}
        dtypes |= {dtype for _, dtype in each.static.outputs}
        if each.static.handler != library.CONV or "uint8" in dtypes:
            raise ValueError("a sequence is of convolutions, of int8 tensors and not uint8 ones")
        taken.append([])
        for place, value in enumerate(each.operands):
            # What is linked is no operand of the whole.
            if isinstance(value, Link):
                taken[-1].append(value)
                continue
            taken[-1].append(len(operands))
            if place in each.static.batched:
                batched.append(len(operands))
            operands.append(value)

    # Behind the operands come the results that are wanted, then what lies between the calls.
    every = [
        (index, result)
        for index, each in enumerate(calls)
        for result in range(len(each.static.outputs))
    ]
    # Asked for twice, a result is given once, and returned twice.
    wanted = list(dict.fromkeys(results))
    ordered = [*wanted, *(key for key in every if key not in wanted)]
    places = {key: len(operands) + place for place, key in enumerate(ordered)}

    # The handler reads the calls from four arrays, each with the fields of all of them in turn.
    records: dict[str, list[int | float]] = {
        "places": [], "images": [], "geometry": [], "clamps": []
    }  # fmt: skip
    for index, each in enumerate(calls):
        takes = [places[x.call, x.result] if isinstance(x, Link) else x for x in taken[index]]
        gives = [places[index, result] for result in range(len(each.static.outputs))]
        records["places"] += _places(each, takes, gives)
        records["images"] += Image(*each.operands[X].shape[1:])
        for name in ("geometry", "clamps"):
            records[name] += dict(each.static.attributes)[name]

    # In the order of places: XLA's results come first behind the operands.
    outputs = tuple(calls[index].static.outputs[result] for index, result in wanted)
    attributes = tuple((name, tuple(numbers)) for name, numbers in records.items())
    given = call(Static(library.SEQUENCE, outputs, tuple(batched), attributes), operands)
    return tuple(given[wanted.index(key)] for key in results)


def _places(each: Call, takes: Sequence[int], gives: Sequence[int]) -> Places:
    """Where the tensors of one call are among those of the sequence.

    Args:
      each: the call.
      takes: the places of its operands.
      gives: the places of its results.
    """
    residual = takes[RESIDUAL] if len(takes) > RESIDUAL else NONE
    # A residual is float or int8, and the kernel has a place for each of them.
    is_float = residual != NONE and each.operands[RESIDUAL].dtype == jnp.float32
    by_dtype = {dtype: at for (_, dtype), at in zip(each.static.outputs, gives, strict=True)}
    return Places(
        x=takes[X],
        packed=takes[PACKED],
        multiplier=takes[MULTIPLIER],
        bias=takes[BIAS] if each.operands[BIAS].size else NONE,
        inv_scale=takes[INV_SCALE],
        residual_scale=takes[RESIDUAL_SCALE],
        zero_points=takes[ZERO_POINTS],
        residual_f=residual if is_float else NONE,
        residual_q=NONE if is_float else residual,
        out_f=by_dtype.get("float32", NONE),
        out_q=by_dtype.get("int8", NONE),
    )
