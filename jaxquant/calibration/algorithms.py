"""`algo` by name: each turns the statistics of all tensors into thresholds, in one call.

`levels` is how many steps of a tensor's grid the threshold maps to; see `jaxquant.kl_threshold`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.calibration import threshold
from jaxquant.calibration.observations import TensorStats

Algorithm = Callable[[Sequence[TensorStats], Sequence[int]], np.ndarray]


def _abs_max(stats: Sequence[TensorStats], levels: Sequence[int]) -> np.ndarray:
    return np.array([s.abs_max for s in stats], np.float64)


def _kl(stats: Sequence[TensorStats], levels: Sequence[int], *, variant: str) -> np.ndarray:
    counts = np.stack([s.counts for s in stats])
    widths = np.array([s.bin_width for s in stats], np.float64)
    largest = _abs_max(stats, levels)
    found = threshold.kl_threshold(
        counts, widths, variant, abs_max=largest, levels=np.array(levels)
    )
    return np.asarray(found, np.float64)


ALGORITHMS: Mapping[str, Algorithm] = {
    "KL": functools.partial(_kl, variant="jaxquant"),
    "KL:paddle-3.3": functools.partial(_kl, variant="paddle-3.3"),
    "KL:paddle-1.6": functools.partial(_kl, variant="paddle-1.6"),
    "KL:nvidia": functools.partial(_kl, variant="nvidia"),
    "abs_max": _abs_max,
    "direct": _abs_max,
}


def find_thresholds(stats: Sequence[TensorStats], levels: Sequence[int], algo: str) -> list[float]:
    """The threshold of each tensor: the largest |x| that its int8 form keeps."""
    return [float(value) for value in ALGORITHMS[algo](stats, levels)] if stats else []
