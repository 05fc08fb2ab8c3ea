"""The search for thresholds of least divergence, without XLA: nothing to compile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxquant.native import build, library


class Weighing(NamedTuple):
    """What weighs one candidate against another; see `jaxquant.calibration.kl`.

    Attributes:
      clipping: weight of the squared clipping error beside that of rounding.
      margin: far above the rounding of sums, relative and absolute.
      slack: by which an error may exceed that of no clipping, relative.
      tie: divergences no further apart are equal.
    """

    clipping: float
    margin: float
    slack: float
    tie: float


def kl_thresholds(
    counts: np.ndarray, limit: np.ndarray, levels: np.ndarray, weighing: Weighing
) -> np.ndarray:
    """Thresholds in bins.  Lets other threads run meanwhile.

    Args:
      counts: float64 [T, N], N >= 2, of |x|.
      limit: float64 [T], no clipping, in bins.
      levels: float64 [T], what the threshold maps to.
      weighing: of the candidates.

    Returns:
      float64 [T], of each tensor one of 1, 2, ... bins or its `limit`.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: the shapes do not fit.
    """
    library.require()
    if counts.ndim != 2 or counts.shape[1] < 2 or {limit.shape, levels.shape} != {counts.shape[:1]}:
        raise ValueError(
            f"expected counts [T, N >= 2], limit [T] and levels [T]; got shapes {counts.shape}, "
            f"{limit.shape} and {levels.shape}"
        )
    arrays = [np.ascontiguousarray(x, np.float64) for x in (counts, limit, levels)]
    found = np.empty(counts.shape[0])
    # ctypes lets go of the interpreter's lock while the function runs.
    build.load().jaxquant_kl_thresholds(*arrays, *counts.shape, *weighing, found)
    return found
