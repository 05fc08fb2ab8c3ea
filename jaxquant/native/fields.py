"""The numbers that a call gives the kernels, as records of named fields, one table for both sides.

XLA passes a handler flat lists of integers and floats; the zero points are one of its operands,
since they may vary from call to call.  What each of the numbers means is said here alone: Python
builds the records by name, and the compiler gets the names of their fields, in order, from
`definitions`, so that the structs of `src/fields.h` have the same fields.  A field that one side
lacks is an error of the type checker or of the compiler, never a number in another's place.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

NONE = -1  # the place of a tensor that a step does not have
# A number, or an int32 [] array of the program.
ZeroPoint: TypeAlias = int | jax.Array


class Geometry(NamedTuple):
    """A convolution but for its input: the output of one sample, the window, the groups.

    Attributes:
      oh, ow, o: rows, columns and channels of the output.
      kh, kw: rows and columns of the kernel.
      stride_h, stride_w: of the window.
      dilation_h, dilation_w: of the kernel.
      pad_h, pad_w: what is before the first row and column; what is behind follows from the output.
      groups: of the channels.
    """

    oh: int
    ow: int
    o: int
    kh: int
    kw: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    pad_h: int
    pad_w: int
    groups: int


class ZeroPoints(NamedTuple):
    """The zero points, as those of int8 tensors also where a tensor is uint8; an int32 operand.

    Attributes:
      input: of the input, which pads it.
      subtracted: what the sums take away: that of the input, or 0 where the bias takes it away.
      residual, output: of each; 0 where there is none.
    """

    input: ZeroPoint
    subtracted: ZeroPoint
    residual: ZeroPoint
    output: ZeroPoint

    def operand(self) -> Any:
        """int32 [4]: a constant, or computed in the program where one of them varies."""
        # One that varies is in the program, so that all four are.
        if any(isinstance(point, jax.Array) for point in self):
            return jnp.stack([jnp.asarray(point, jnp.int32) for point in self])
        return np.asarray(self, np.int32)


class Clamps(NamedTuple):
    """The bounds of the clips before the residual is added and behind it."""

    low: float
    high: float
    low_after: float
    high_after: float


class Image(NamedTuple):
    """Rows, columns and channels of a step's input."""

    h: int
    w: int
    c: int


class Places(NamedTuple):
    """Where the tensors of a step are among those of its sequence; `NONE` for one that it lacks.

    The operands of the sequence come first, then its results, then what lies between its steps.

    Attributes:
      x, packed, multiplier, bias, inv_scale, residual_scale, zero_points: what the step reads.
      residual_f, residual_q: the residual where it is float32, and where it is int8.
      out_f, out_q: the float32 and the int8 result.
    """

    x: int
    packed: int
    multiplier: int
    bias: int
    inv_scale: int
    residual_scale: int
    zero_points: int
    residual_f: int
    residual_q: int
    out_f: int
    out_q: int


RECORDS = (Geometry, ZeroPoints, Clamps, Image, Places)


def definitions() -> tuple[str, ...]:
    """The flags that tell the compiler the fields of each record, as declarators in C++."""
    return tuple(
        f"-DJAXQUANT_{record.__name__.upper()}={','.join(record._fields)}" for record in RECORDS
    )
