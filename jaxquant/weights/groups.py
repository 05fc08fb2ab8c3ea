"""Weights as integers of 8 or 4 bits with a scale for each group of them.

Symmetric: [-127, 127] or [-7, 7], scale = the largest |w| of the group over 127 or 7, round half to
even.  A group that is all zero has scale 1, and no scale is below the least float32 that programs
compute with.  Two 4-bit integers share a byte: JAX keeps `jnp.int4`
in a byte each on CPU and in files.
"""

from __future__ import annotations

import numpy as np

from jaxquant.plan.grid import SMALLEST_SCALE
from jaxquant.plan.groups import GroupLayout

_LARGEST = {8: 127, 4: 7}


def quantize_groups(
    weight: np.ndarray, layout: GroupLayout, weight_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight by groups.

    Args:
      weight: floats, any shape.
      layout: its groups.
      weight_bits: 8 or 4.

    Returns:
      The integers: int8 in the weight's own shape, or packed as `pack` does, uint8 [..., K/2, ...]
      in `layout.shape` otherwise; and their float64 scales [..., G, ...], likewise.

    Example:
      >>> from jaxquant.plan.groups import group_layout
      >>> weight = np.array([[7.0], [-1.0], [14.0], [2.0]])
      >>> packed, scale = quantize_groups(weight, group_layout((4, 1), (1,), 2), weight_bits=4)
      >>> unpack(packed, 0, 4).tolist(), scale.tolist()
      ([[7], [-1], [7], [1]], [[1.0], [2.0]])
    """
    rows = np.asarray(weight).astype(np.float64).transpose(layout.order).reshape(layout.shape)
    rows = np.moveaxis(rows, layout.axis, -1)
    length, size, groups = rows.shape[-1], layout.size, layout.groups
    padded = np.zeros((*rows.shape[:-1], groups * size))
    padded[..., :length] = rows
    padded = padded.reshape(*rows.shape[:-1], groups, size)
    largest = _LARGEST[weight_bits]
    threshold = np.abs(padded).max(axis=-1, initial=0.0)
    scale = np.where(threshold > 0, np.maximum(threshold / largest, SMALLEST_SCALE), 1.0)
    integers = np.clip(np.rint(padded / scale[..., None]), -largest, largest).astype(np.int8)
    integers = integers.reshape(*rows.shape[:-1], groups * size)[..., :length]
    integers = np.moveaxis(integers, -1, layout.axis)
    scale = np.moveaxis(scale, -1, layout.axis)
    if weight_bits == 4:
        return pack(integers, layout.axis), scale
    return integers.reshape(layout.permuted).transpose(layout.inverse), scale


def pack(integers: np.ndarray, axis: int) -> np.ndarray:
    """Pairs of 4-bit integers along an axis in one byte, the first in the low half; uint8.

    Example:
      >>> pack(np.array([1, -1, 7], np.int8), 0).tolist()
      [241, 7]
    """
    last = np.moveaxis(np.asarray(integers), axis, -1).astype(np.uint8) & 15
    if last.shape[-1] % 2:
        last = np.concatenate([last, np.zeros((*last.shape[:-1], 1), np.uint8)], axis=-1)
    return np.moveaxis(last[..., ::2] | (last[..., 1::2] << 4), -1, axis)


def unpack(packed: np.ndarray, axis: int, length: int) -> np.ndarray:
    """The `length` integers that `pack` put together along an axis; int8.

    Example:
      >>> unpack(np.array([241, 7], np.uint8), 0, 3).tolist()
      [1, -1, 7]
    """
    last = np.moveaxis(np.asarray(packed), axis, -1)
    both = np.stack([last & 15, last >> 4], axis=-1).astype(np.int8)
    both = both.reshape(*last.shape[:-1], 2 * last.shape[-1])[..., :length]
    return np.moveaxis(np.where(both > 7, both - np.int8(16), both), -1, axis)
