"""The int8 grid of a tensor: its scale and zero point, from a threshold and the extreme values.

Symmetric int8 has scale = threshold / 127 and zero point 0.  Asymmetric int8 holds on [-128, 127]
the values from the least to the largest one within the threshold: a tensor that is never negative
has zero point -128 and twice the resolution.  value = (int8 - zero_point) * scale, and zero is
exact on either.  Rounding is half to even; what is beyond saturates at -128 and 127 on either, as
ONNX's QuantizeLinear and the runtimes have it.
"""

from __future__ import annotations

from typing import NamedTuple

SMALLEST_SCALE = 2.0**-126  # its inverse is still a float32
_GAIN = 0.9  # an asymmetric step has to be smaller than this part of the symmetric one


class Grid(NamedTuple):
    """scale: the step; zero_point: the int8 that stands for zero."""

    scale: float
    zero_point: int


def make_grid(threshold: float, low: float, high: float, asymmetric: bool = True) -> Grid:
    """The grid for values in [low, high] that are clipped to [-threshold, threshold].

    Args:
      threshold: the largest |x| that is kept; 0 for a tensor that is all zero (scale 1).
      low, high: the least and the largest value.
      asymmetric: False for zero point 0 always; else it is 0 where another gains little.

    Example:
      >>> make_grid(255.0, 0.0, 300.0)
      Grid(scale=1.0, zero_point=-128)
      >>> make_grid(127.0, -127.0, 110.0)
      Grid(scale=1.0, zero_point=0)
    """
    # All zero: any scale is right, and 1 divides by nothing.
    if threshold <= 0:
        return Grid(1.0, 0)
    symmetric = threshold / 127
    # Zero is always on the grid: padding and ReLU need it exactly.
    low, high = max(min(low, 0.0), -threshold), min(max(high, 0.0), threshold)
    step = (high - low) / 255

    if not asymmetric or step >= _GAIN * symmetric:
        return Grid(max(symmetric, SMALLEST_SCALE), 0)
    step = max(step, SMALLEST_SCALE)
    return Grid(step, round(-128 - low / step))


def levels(low: float, high: float, asymmetric: bool = True) -> int:
    """How many steps a grid without clipping has between zero and the largest |x|.

    Example:
      >>> levels(0.0, 3.0), levels(-3.0, 3.0), levels(-1.0, 3.0)
      (255, 127, 191)
    """
    # The zero point sits where the range puts it; the longer side of it counts.
    largest = max(-low, high)
    grid = make_grid(largest, low, high, asymmetric)
    if grid.zero_point == 0:
        return 127
    return max(grid.zero_point + 128, 127 - grid.zero_point)
