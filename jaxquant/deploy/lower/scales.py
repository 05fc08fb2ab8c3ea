"""What the integers of an int8 tensor are worth, by its entry in `qparams["tensors"]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxquant.plan.plan import Plan


class Scales:
    """The grids of the int8 tensors of a model.

    Args:
      plan: of the model.
      tensors: what `qparams` holds under this name, stacked where a tensor has layers.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        self._scales = {
            tensor.name: np.asarray(tensors[tensor.base]["scale"])[tensor.layer]
            for tensor in plan.tensors
        }
        self._zero_points = {tensor.name: tensor.zero_point for tensor in plan.tensors}
        self._divided = {tensor.name: tensor.scale for tensor in plan.tensors if tensor.channels}

    def scale(self, entry: str) -> float:
        """What one step of a tensor is worth; of a divided one, to the weights behind it."""
        if entry in self._divided:
            return float(np.float32(self._divided[entry]))
        # One for each channel, all alike, where other layers are divided by channel.
        return float(self._scales[entry].flat[0])

    def zero_point(self, entry: str) -> int:
        """The int8 integer that stands for zero."""
        return int(self._zero_points[entry])

    def is_divided(self, entry: str) -> bool:
        """True for a tensor that is divided, channel by channel, before it is quantized.

        The weights behind it carry what it was divided by.
        """
        return entry in self._divided

    def divisors(self, entry: str) -> np.ndarray:
        """What a divided tensor is divided by: float64, broadcasting against it."""
        return self._scales[entry].astype(np.float64) / self.scale(entry)
