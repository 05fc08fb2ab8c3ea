"""Weights as int8: their scales, and their integers.

Weights are symmetric int8: [-127, 127], scale = threshold / 127, round half to even.  The threshold
is the largest |w| of a channel, or of the weight; a little more where that keeps the site's sums
away from ties (`jaxquant.plan.ties`).  A channel that is all zero has scale 1, and no scale is
below the least float32 that programs compute with: XLA takes smaller ones for zero.  The arithmetic
is float64 on the host; the results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxquant.graph.sites import Site
from jaxquant.plan.grid import SMALLEST_SCALE


def weight_scale(weight: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """The scales of a weight, one for every index along `axes` (none: one for all of it).

    Args:
      weight: float64, of any shape.
      axes: of the output channels, or none.

    Returns:
      float64 [C] with C the product of the sizes of `axes`, or [].

    Example:
      >>> (weight_scale(np.array([[1.0, 0.0], [-0.5, 0.0]]), axes=(1,)) * 127).tolist()
      [1.0, 127.0]
    """
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = np.abs(weight).max(axis=summed, initial=0.0)
    scale = np.where(threshold > 0, np.maximum(threshold / 127.0, SMALLEST_SCALE), 1.0)
    return scale.reshape(-1) if axes else scale.reshape(())


def quantize_weight(weight: np.ndarray, axes: Sequence[int], scale: np.ndarray) -> np.ndarray:
    """The int8 weight on the grids of its scales.

    Args:
      weight: float64, of any shape.
      axes: of the output channels, or none.
      scale: [C] or [], not below that of `weight_scale`.

    Example:
      >>> weight = np.array([[1.0, 0.0], [-0.5, 0.0]])
      >>> quantize_weight(weight, (1,), weight_scale(weight, (1,))).tolist()
      [[127, 0], [-64, 0]]
    """
    steps = np.asarray(weight / along_channels(scale, axes, weight.shape))
    np.rint(steps, out=steps)
    return np.clip(steps, -127, 127, out=steps).astype(np.int8)


def along_channels(values: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """[C] or [], in the order of a weight's channels, so that it broadcasts against the weight.

    Args:
      values: one for each output channel, or one for all.
      axes: of the weight, along its output channels.
      shape: the weight's.
    """
    if values.ndim == 0:
        return values
    return values.reshape([shape[a] if a in axes else 1 for a in range(len(shape))])


def relative_scales(
    site: Site, weight: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scales of a weight that rows choose from: the largest of each channel, and parts of it.

    Args:
      site: a ragged dot with a stored weight.
      weight: its weight.
      scale: [C] or [], of the weight's channels.

    Returns:
      [C'], for each channel of the result the largest scale of all that may be chosen; and float32
      [C], each scale as a part of that, 0 where all of a channel is zero.
    """
    kept, chosen = site.channel_axes, site.weight_axes.chosen
    used = channels_in_use(weight, kept)
    shape = [weight.shape[axis] for axis in kept]

    # A channel of zeros has any scale, which must not be the largest of all.
    each = np.where(used, np.broadcast_to(scale, used.shape), 0.0).reshape(shape)
    largest = each.max(axis=tuple(kept.index(axis) for axis in chosen), keepdims=True)
    relative = each / np.where(largest > 0, largest, 1.0)
    return largest.reshape(-1), relative.reshape(-1).astype(np.float32)


def channels_in_use(weight: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """bool [C], False where all of a channel is zero before it is rounded."""
    return weight.any(axis=tuple(a for a in range(weight.ndim) if a not in axes)).reshape(-1)
