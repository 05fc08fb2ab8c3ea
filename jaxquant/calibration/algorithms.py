"""`algo` by name: each turns the statistics of all tensors into thresholds, in one call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxquant.calibration import threshold
from jaxquant.calibration.observations import Observations, TensorStats, merge

Algorithm = Callable[[Sequence[TensorStats]], np.ndarray]


def _abs_max(stats: Sequence[TensorStats]) -> np.ndarray:
    return np.array([s.abs_max for s in stats], np.float64)


def _kl(stats: Sequence[TensorStats], *, variant: str) -> np.ndarray:
    counts = np.stack([s.counts for s in stats])
    widths = np.array([s.bin_width for s in stats], np.float64)
    found = threshold.kl_threshold(counts, widths, variant, abs_max=_abs_max(stats))
    return np.asarray(found, np.float64)


ALGORITHMS: Mapping[str, Algorithm] = {
    "KL": functools.partial(_kl, variant="jaxquant"),
    "KL:paddle-3.3": functools.partial(_kl, variant="paddle-3.3"),
    "KL:paddle-1.6": functools.partial(_kl, variant="paddle-1.6"),
    "KL:nvidia": functools.partial(_kl, variant="nvidia"),
    "abs_max": _abs_max,
    "direct": _abs_max,
}


def find_thresholds(
    observations: Observations, algo: str, groups: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Group -> threshold, the |x| that maps to 127; a group is a name and the tensors in it."""
    if not groups:
        return {}
    stats = [merge([observations.tensors[t] for t in tensors]) for tensors in groups.values()]
    found = ALGORITHMS[algo](stats)
    return {name: float(value) for name, value in zip(groups, found, strict=True)}
