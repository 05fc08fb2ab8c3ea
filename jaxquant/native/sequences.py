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
from jaxquant.native.ops import Call

_NONE = -1
_BIAS, _RESIDUAL = 3, 6  # their places among the operands of a call


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
        dtypes = {jnp.dtype(x.dtype).name for x in (each.operands[0], *each.operands[_RESIDUAL:])}
        dtypes |= {dtype for _, dtype in each.static.outputs}
        if each.static.target != library.CONV or "uint8" in dtypes:
            raise ValueError("a sequence is of convolutions, of int8 tensors and not uint8 ones")
        taken.append([])
        for k, value in enumerate(each.operands):
            if isinstance(value, Link):
                taken[-1].append(value)
                continue
            taken[-1].append(len(operands))
            if k in each.static.batched:
                batched.append(len(operands))
            operands.append(value)
    # Behind the operands come the results that are wanted, then what lies between the calls.
    every = [(i, k) for i, each in enumerate(calls) for k in range(len(each.static.outputs))]
    wanted = list(dict.fromkeys(results))
    ordered = [*wanted, *(key for key in every if key not in wanted)]
    places = {key: len(operands) + place for place, key in enumerate(ordered)}
    program: list[int] = []
    clamps: list[float] = []
    for index, each in enumerate(calls):
        takes = [places[x.call, x.result] if isinstance(x, Link) else x for x in taken[index]]
        gives = [places[index, k] for k in range(len(each.static.outputs))]
        program += _step(each, takes, gives)
        clamps += dict(each.static.attributes)["clamps"]
    outputs = tuple(calls[index].static.outputs[k] for index, k in wanted)
    attributes = (("program", tuple(program)), ("clamps", tuple(clamps)))
    given = call(Static(library.SEQUENCE, outputs, tuple(batched), attributes), operands)
    return tuple(given[wanted.index(key)] for key in results)


def _step(each: Call, takes: Sequence[int], gives: Sequence[int]) -> list[int]:
    """One call as `SequenceReader` in `src/fused.h` reads it."""
    attributes = dict(each.static.attributes)
    residual = takes[_RESIDUAL] if len(takes) > _RESIDUAL else _NONE
    is_float = residual != _NONE and each.operands[_RESIDUAL].dtype == jnp.float32
    by_dtype = {dtype: at for (_, dtype), at in zip(each.static.outputs, gives, strict=True)}
    bias = takes[_BIAS] if each.operands[_BIAS].size else _NONE
    return [
        *takes[:_BIAS],
        bias,
        *takes[_BIAS + 1 : _RESIDUAL],
        residual if is_float else _NONE,
        _NONE if is_float else residual,
        by_dtype.get("float32", _NONE),
        by_dtype.get("int8", _NONE),
        *each.operands[0].shape[1:],
        *attributes["shape"],
        *attributes["quantized"],
    ]
