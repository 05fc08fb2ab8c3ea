"""Weights as integers of 8 or 4 bits with a scale for each group of them.

Without a zero point, on [-127, 127] or [-8, 7], round half to even.  In 8 bits the scale is the
least that clips no weight of the group; in 4 bits, where a step is large, it is that or down to
half of it, whichever leaves the least squared error: the largest weight is clipped where the steps
of all the others are worth more.  A group that is all zero has scale 1, and no scale is below the
least float32 that programs compute with; see `jaxquant.weights.scales`.  Two 4-bit integers share a
byte: JAX keeps `jnp.int4` in a byte each on CPU and in files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxquant.code_tables import INT
from jaxquant.plan.groups import GroupLayout
from jaxquant.weights.codes import encode
from jaxquant.weights.scales import rounded_scale

# Bits -> the least and the largest integer.  Of 15 one more is worth having, of 255 it is not.
RANGES: Mapping[int, tuple[int, int]] = {8: (-127, 127), 4: (-8, 7)}
PARTS = tuple(n / 20 for n in range(20, 9, -1))  # of the scale that clips nothing: what is tried
_BLOCK = 1 << 20  # weights whose scales are searched together


def quantize_groups(
    weight: np.ndarray, layout: GroupLayout, weight_bits: int, weight_dtype: str = INT
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight by groups.

    Args:
      weight: floats, any shape.
      layout: its groups.
      weight_bits: 8 or 4.
      weight_dtype: what four bits are; see `jaxquant.weights.codes`.

    Returns:
      The integers: int8 in the weight's own shape, or packed as `pack` does, uint8 [..., K/2, ...]
      in `layout.shape` otherwise; and their scales [..., G, ...], likewise, of the layout's dtype.
      Of "mxfp4" uint8 exponents are the scales.

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
    # The last group may be shorter: zeros change neither its largest value nor its error.
    padded = np.zeros((*rows.shape[:-1], groups * size))
    padded[..., :length] = rows
    padded = padded.reshape(*rows.shape[:-1], groups, size)
    if weight_dtype != INT:
        integers, scale = encode(padded, weight_dtype, layout.scale_dtype)
        integers = integers.reshape(*rows.shape[:-1], groups * size)[..., :length]
        packed = pack(np.moveaxis(integers, -1, layout.axis), layout.axis)
        return packed, np.moveaxis(scale, -1, layout.axis)
    least, most = bounds = RANGES[weight_bits]
    # Of 8 bits no weight is clipped; of 4 a smaller scale has less error on the whole.
    scale = np.maximum(
        padded.max(axis=-1, initial=0.0) / most, padded.min(axis=-1, initial=0.0) / least
    )
    if weight_bits == 4:
        scale = _least_error(padded, scale, bounds, layout.scale_dtype)
    scale = np.where(scale > 0, rounded_scale(scale, layout.scale_dtype), 1.0)
    integers = _rounded(padded, scale, bounds).astype(np.int8)
    integers = integers.reshape(*rows.shape[:-1], groups * size)[..., :length]
    scale = np.moveaxis(scale, -1, layout.axis).astype(layout.scale_dtype)
    return stored(np.moveaxis(integers, -1, layout.axis), layout, weight_bits), scale


def stored(integers: np.ndarray, layout: GroupLayout, weight_bits: int) -> np.ndarray:
    """Integers int8 in `layout.shape` as they are stored; see `quantize_groups`."""
    if weight_bits == 4:
        return pack(integers, layout.axis)
    return integers.reshape(layout.permuted).transpose(layout.inverse)


def in_layout(integers: np.ndarray, layout: GroupLayout, weight_bits: int) -> np.ndarray:
    """Stored integers as int8 in `layout.shape`: what `stored` was given."""
    if weight_bits == 4:
        return unpack(integers, layout.axis, layout.shape[layout.axis])
    return np.asarray(integers).transpose(layout.order).reshape(layout.shape)


def _rounded(groups: np.ndarray, scale: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    """Groups [..., size] in whole steps of their scales [...]."""
    return np.clip(np.rint(groups / scale[..., None]), *bounds)


def _least_error(
    groups: np.ndarray, whole: np.ndarray, bounds: tuple[int, int], scale_dtype: np.dtype
) -> np.ndarray:
    """The scales [...] with the least squared error of groups [..., size].

    Args:
      groups: the weights.
      whole: [...], the least scales that clip none of them.
      bounds: of the integers.
      scale_dtype: what scales are rounded to.
    """
    flat, found = groups.reshape(-1, groups.shape[-1]), whole.reshape(-1).copy()
    count = max(1, _BLOCK // max(flat.shape[-1], 1))
    for first in range(0, len(flat), count):  # a few rows at a time: each trial copies them
        some, own = flat[first : first + count], found[first : first + count]
        most, least = own.copy(), np.full(own.shape, np.inf)
        for part in PARTS:
            scale = rounded_scale(most * part, scale_dtype)
            off = _rounded(some, scale, bounds) * scale[..., None] - some
            error = np.einsum("gk,gk->g", off, off)
            is_less = error < least
            own[is_less], least[is_less] = (most * part)[is_less], error[is_less]
    return found.reshape(whole.shape)


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
