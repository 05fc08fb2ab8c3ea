"""The weights of sites with their epilogue folded in, as runtimes take them.

A runtime has a scale for every output channel and an int32 bias; a site's multiplier and its float
bias become those.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.model import Lowered
from jaxquant.deploy.network import Int8Node
from jaxquant.weights.epilogue import LARGEST_BIAS, sums_by_channel


class SiteArrays(NamedTuple):
    """What a site with a weight computes on.

    Attributes:
      int8: its weight, in the layout of the JAX operation.
      multiplier: float64 [C], what one unit of the accumulator is worth.
      bias: float64 [C], or None.
    """

    int8: np.ndarray
    multiplier: np.ndarray
    bias: np.ndarray | None


def site_arrays(model: Lowered, site: Int8Node) -> SiteArrays:
    """The arrays of a site with a weight whose input is dequantized.

    In `qparams` the bias takes away what the zero point adds to the sums; a dequantized input has
    none to take away.

    Raises:
      NotCovered: the weight depends on the size of the batch.
    """
    arrays = model.sites[site.name]
    zero_point = 0 if site.dynamic else model.scales.zero_point(model.entries(site)[0])
    scale = np.ones(())
    if site.weight:
        int8 = model.arrays[site.weight]
    else:
        constant = model.network.constants.get(str(site.computed_weight))
        if constant is None:
            raise NotCovered("a weight that the model makes to the size of the batch, in int8")
        # A weight that follows from constants is rounded here, as the program does in each call.
        value = model.arrays[constant]
        int8, scale = _quantize_weight(value.astype(np.float32), site.weight_axes)
    channels = (math.prod(int8.shape[axis] for axis in site.weight_axes),)
    multiplier = np.broadcast_to(arrays["multiplier"].astype(np.float64) * scale, channels)
    if "bias" not in arrays:
        return SiteArrays(int8, multiplier, None)
    bias = np.broadcast_to(arrays["bias"].astype(np.float64), channels)
    # The stored bias has the zero point in it; runtimes subtract the zero point by themselves.
    if zero_point and site.weight:
        bias = bias + multiplier * zero_point * sums_by_channel(int8, site.weight_axes)
    return SiteArrays(int8, multiplier, bias)


@dataclasses.dataclass(frozen=True)
class Weight:
    """An int8 weight with what one step of each output channel is worth.

    Attributes:
      int8: in the layout of the file.
      scale: float32 [C], positive.
      steps: float32 [C], what one unit of the accumulator is worth: `scale` times the input's, as
        runtimes round it where such a scale exists.
      bias: float64 [C].
      axis: the axis of the channels.
    """

    int8: np.ndarray
    scale: np.ndarray
    steps: np.ndarray
    bias: np.ndarray | None
    axis: int

    def bias_steps(self) -> np.ndarray | None:
        """The bias in steps of the accumulator, int32 [C]; None for none."""
        if self.bias is None:
            return None
        return np.rint(self.bias / self.steps.astype(np.float64)).astype(np.int32)


def make_weight(
    int8: np.ndarray,
    axis: int,
    multiplier: np.ndarray,
    bias: np.ndarray | None,
    input_scale: float,
) -> Weight:
    """Fold a site's multiplier into the scales of its weight.

    A negative multiplier (of a BatchNorm, say) turns the weight's sign, one of zero makes the
    weight zero.  Where the bias is so large in steps of the accumulator that int32 does not hold
    it, the steps of that channel are made larger.

    Args:
      int8: the weight in the layout of the file.
      axis: of its output channels.
      multiplier: [C], what one unit of the accumulator is worth.
      bias: [C] or None.
      input_scale: of the tensor that the weight meets.
    """
    # A runtime multiplies the scales of weight and input in float32.  Those products are the steps,
    # and where float32 has such a scale they are the site's multipliers to the last bit.
    along = [1] * int8.ndim
    along[axis] = -1
    multiplier = multiplier.astype(np.float64)
    worth = np.abs(multiplier)
    steps = worth if bias is None else np.maximum(worth, np.abs(bias) / LARGEST_BIAS)
    # Below it the step, or the scale that gives it, would be subnormal, and runtimes may flush it.
    least = 2.0**-126 * max(input_scale, 1.0)
    steps = np.maximum(np.where(steps > 0, steps, input_scale), least).astype(np.float32)
    ratio = np.sign(multiplier) * worth / steps.astype(np.float64)
    # So near to one it is float32's rounding: integers that are left alone stay exact.
    exact = np.abs(np.abs(ratio) - 1) < 1e-5
    ratio = np.where(exact, np.sign(ratio), ratio).reshape(along)
    folded = np.clip(np.rint(int8 * ratio), -127, 127).astype(np.int8)
    scale = _factor(steps, np.float32(input_scale))
    return Weight(folded, scale, steps, None if bias is None else bias.astype(np.float64), axis)


def _factor(wanted: np.ndarray, other: np.float32) -> np.ndarray:
    """float32 [C] that gives `wanted` when multiplied by `other` in float32, or the next to it."""
    nearest = (wanted.astype(np.float64) / other).astype(np.float32)
    # The product is rounded too: of three neighbours one mostly gives it to the bit.
    below, above = (np.nextafter(nearest, np.float32(bound)) for bound in (0, np.inf))
    choices = [nearest, below, above]
    return np.select([choice * other == wanted for choice in choices], choices, nearest)


def _quantize_weight(weight: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a weight as `jaxquant.run.accumulate` does in the program."""
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = np.abs(weight).max(axis=summed, keepdims=True)
    scale = np.where(threshold > 0, threshold, np.float32(127)) / np.float32(127)
    int8 = np.clip(np.rint(weight * (np.float32(1) / scale)), -127, 127).astype(np.int8)
    return int8, scale.reshape(-1).astype(np.float64)
