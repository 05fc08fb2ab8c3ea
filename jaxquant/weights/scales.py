"""Scales of groups of weights, as programs read them.

They are rounded before the integers are found, which take up the difference: with a bfloat16, off
by 2 ** -8 of itself at most, 127 steps end less than half a step from where those of the exact
scale do, so that the largest weight is off by no more than any other may be.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxquant.plan.grid import SMALLEST_SCALE


def rounded_scale(scale: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The nearest scales that a program can compute with, float64.

    Where they are stored as float32 they stay as exact as they are.

    Args:
      scale: float64, not below 0.
      dtype: that they are stored as, float32 or bfloat16.

    Example:
      >>> rounded_scale(np.array([0.0, 1 / 7]), np.dtype(jnp.bfloat16)).tolist()
      [1.1754943508222875e-38, 0.142578125]
    """
    scale = np.maximum(scale, SMALLEST_SCALE)
    if dtype == np.float32:
        return scale
    # What is above the largest bfloat16 would be infinite.
    most = float(jnp.finfo(dtype).max)
    return np.minimum(scale, most).astype(dtype).astype(np.float64)
