"""Zero points: numbers of Python, or int32 [] arrays where they vary from step to step of a loop.

A number that is known while a program is traced leaves things out of it: nothing is added where the
zero point is 0, and a convolution pads by itself.  Of an array only the program itself knows the
value, so nothing is left out.  The results are the same integers.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax

ZeroPoint: TypeAlias = int | jax.Array


class ZeroPoints(NamedTuple):
    """The zero points of a call: of x, an int8 residual and an int8 result; 0 of what it lacks."""

    x: ZeroPoint
    residual: ZeroPoint
    out: ZeroPoint


def is_zero(zero_point: ZeroPoint) -> bool:
    """True for a number that is 0; an array may be anything."""
    # Asked of an array, `== 0` would be an array.
    return not isinstance(zero_point, jax.Array) and zero_point == 0
