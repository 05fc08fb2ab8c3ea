"""Weights as codes of four bits, each of which stands for a value in a table.

See `jaxquant.code_tables` for the tables.
"""

from __future__ import annotations

import numpy as np

from jaxquant.code_tables import BIAS, MXFP4, VALUES
from jaxquant.weights.scales import rounded_scale

_LARGEST_EXPONENT = 2  # of the elements of MXFP4


def encode(
    groups: np.ndarray, weight_dtype: str, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Codes for groups of weights, and the groups' scales.

    Args:
      groups: float64 [..., size].
      weight_dtype: "nf4" or "mxfp4".
      scale_dtype: of the scales of "nf4".

    Returns:
      uint8 [..., size], codes 0 to 15; and the scales [...], of "mxfp4" uint8 exponents.

    Example:
      >>> groups = np.array([[3.0, -0.4, 5.0, 7.9]])
      >>> codes, exponents = encode(groups, "mxfp4", np.dtype(np.float32))
      >>> codes.tolist(), exponents.tolist()
      ([[5, 9, 6, 7]], [127])
    """
    largest = np.abs(groups).max(axis=-1, initial=0.0)
    if weight_dtype == MXFP4:
        exponents = _exponents(largest)
        scaled = groups / np.exp2(exponents.astype(np.float64) - BIAS)[..., None]
        return _nearest_float(scaled), exponents
    # A group of zeros has any scale: its codes are those of zero.
    scale = np.where(largest > 0, rounded_scale(largest, scale_dtype), 1.0)
    values = VALUES[weight_dtype].astype(np.float64)
    between = (values[1:] + values[:-1]) / 2
    # Bounds in the middle between values: the nearest code, by one search.
    codes = np.searchsorted(between, groups / scale[..., None]).astype(np.uint8)
    return codes, scale.astype(scale_dtype)


def _exponents(largest: np.ndarray) -> np.ndarray:
    """E8M0: the exponent of the largest |w| less that of the largest element."""
    known = np.where(largest > 0, largest, 1.0)
    exponents = np.floor(np.log2(known)) - _LARGEST_EXPONENT
    return np.clip(exponents + BIAS, 1, 254).astype(np.uint8)


def _nearest_float(scaled: np.ndarray) -> np.ndarray:
    """The codes of the nearest elements, of two as near the one with an even code; clipped."""
    values = VALUES[MXFP4][:8].astype(np.float64)
    between = (values[1:] + values[:-1]) / 2
    size = np.abs(scaled)
    low, high = np.searchsorted(between, size, "left"), np.searchsorted(between, size, "right")
    codes = np.where(low % 2 == 0, low, high)
    return (codes + 8 * (scaled < 0)).astype(np.uint8)
