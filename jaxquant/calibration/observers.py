"""Observers: what a sweep keeps of a tensor, and how that becomes a threshold.

`algo` is the name of one, or one of the user's own.  `levels` is how many steps of a tensor's grid
the threshold maps to; see `jaxquant.kl_threshold`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration import counting, histogram, kl, threshold
from jaxquant.calibration.observations import TensorStats
from jaxquant.jax_shim.extremes import largest


class Observer(NamedTuple):
    """One way to choose thresholds: three functions, the first two pure.

    Attributes:
      init: () -> the state of one tensor before any data, a pytree of arrays.
      update: (state, x) -> the state with one more batch; x is the tensor, of any shape and of a
        float dtype.  It is compiled into the calibration sweep.
      threshold: (states of T tensors in NumPy, levels [T]) -> T thresholds, the largest |x| that is
        kept of each.  An observer with the `init` and `update` of `jaxquant.histogram_observer`
        gets `TensorStats` for states, of tensors that share a scale together; of any other the
        largest threshold of those tensors counts.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> largest = jaxquant.Observer(
      ...     init=lambda: jnp.zeros(()),
      ...     update=lambda state, x: jnp.maximum(state, 0.9 * abs(x).max()),
      ...     threshold=lambda states, levels: states)
      >>> qparams, qapply = jaxquant.quant_post(
      ...     {"w": jnp.eye(4)}, lambda p, x: x @ p["w"], [jnp.ones((2, 4))],
      ...     algo=largest, progress=False)
      >>> round(qapply.plan.tensors[0].threshold, 3)
      0.9
    """

    init: Callable[[], Any]
    update: Callable[[Any, jax.Array], Any]
    threshold: Callable[[Sequence[Any], Sequence[int]], Sequence[float] | np.ndarray]

    @property
    def keeps_histogram(self) -> bool:
        """True where the statistics of every sweep are all that it needs."""
        return self.update is counting.update


def histogram_observer(
    function: Callable[[Sequence[TensorStats], Sequence[int]], Sequence[float] | np.ndarray],
) -> Observer:
    """An observer of the statistics that every sweep keeps: histogram of |x|, extremes, count.

    Example:
      >>> half = histogram_observer(lambda stats, levels: [s.abs_max / 2 for s in stats])
      >>> half.keeps_histogram
      True
    """
    return Observer(histogram.init, counting.update, function)


def percentile(hist_percent: float = 0.99999) -> Observer:
    """The |x| below which the fraction `hist_percent` of the values lies."""
    threshold.check_percent(hist_percent)
    return histogram_observer(functools.partial(_percentile, percent=hist_percent))


def _abs_max(stats: Sequence[TensorStats], levels: Sequence[int]) -> np.ndarray:
    return np.array([s.abs_max for s in stats], np.float64)


def _percentile(
    stats: Sequence[TensorStats], levels: Sequence[int], *, percent: float
) -> np.ndarray:
    counts, widths, largest = _stacked(stats)
    return threshold.percentile_threshold(counts, widths, percent, abs_max=largest)


def _searched(search: Callable[..., np.ndarray], *args: Any) -> Observer:
    def function(stats: Sequence[TensorStats], levels: Sequence[int]) -> np.ndarray:
        counts, widths, largest = _stacked(stats)
        return search(counts, widths, *args, abs_max=largest, levels=np.array(levels))

    return histogram_observer(function)


def _stacked(stats: Sequence[TensorStats]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.stack([s.counts for s in stats]),
        np.array([s.bin_width for s in stats], np.float64),
        np.array([s.abs_max for s in stats], np.float64),
    )


class _Peaks(NamedTuple):
    """The mean of the largest |x| of every sample, which does not overflow; how many samples."""

    mean: jax.Array
    samples: jax.Array


def _no_peaks() -> _Peaks:
    return _Peaks(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def _add_peaks(state: _Peaks, x: jax.Array) -> _Peaks:
    rows = x.reshape(x.shape[0] if x.ndim > 1 else 1, -1).astype(jnp.float32)
    peaks = largest(jnp.abs(rows), axis=1, initial=0.0)
    samples = state.samples + jnp.float32(len(rows))
    # The mean moves by parts of differences: a sum of peaks near the largest float would be
    # infinite.
    moved = jnp.sum((peaks - state.mean) / jnp.maximum(samples, 1))
    return _Peaks(state.mean + moved, samples)


def _mean_peak(states: Sequence[_Peaks], levels: Sequence[int]) -> list[float]:
    return [float(s.mean) for s in states]


ABS_MAX = histogram_observer(_abs_max)

OBSERVERS: Mapping[str, Observer] = {
    "KL": _searched(kl.kl_threshold, "jaxquant"),
    "KL:paddle-3.3": _searched(kl.kl_threshold, "paddle-3.3"),
    "KL:paddle-1.6": _searched(kl.kl_threshold, "paddle-1.6"),
    "KL:nvidia": _searched(kl.kl_threshold, "nvidia"),
    "abs_max": ABS_MAX,
    "direct": ABS_MAX,
    "min_max": ABS_MAX,  # the grid reaches from the least to the largest value
    "avg": Observer(_no_peaks, _add_peaks, _mean_peak),
    "hist": percentile(),
    "percentile": percentile(),
    "mse": _searched(threshold.mse_threshold),
    "emd": _searched(threshold.emd_threshold),
    "ptf": _searched(threshold.ptf_threshold),
    "auto": _searched(threshold.auto_threshold),
}


def find_observer(algo: str | Observer, hist_percent: float) -> Observer:
    """The observer of a name or of the user's own."""
    if isinstance(algo, Observer):
        return algo
    return percentile(hist_percent) if algo in ("hist", "percentile") else OBSERVERS[algo]


def check_thresholds(found: Sequence[float] | np.ndarray, tensors: Sequence[str]) -> list[float]:
    """The thresholds as floats.

    Raises:
      ValueError: an observer of the user's own gave too many, or one that is negative or NaN.
    """
    values = np.asarray(found, np.float64).reshape(-1)
    if len(values) != len(tensors):
        raise ValueError(f"the observer gave {len(values)} thresholds for {len(tensors)} tensors")
    for name, value in zip(tensors, values, strict=True):
        # NaN fails this too.
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"the observer gave the threshold {value} for tensor {name!r}")
    return [float(value) for value in values]
