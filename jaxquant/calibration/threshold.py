"""Threshold searches: from histograms of |x| to the largest |x| that the int8 form keeps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxquant.calibration.search import search
from jaxquant.calibration.sums import (
    CLIPPING_WEIGHT,
    SYMMETRIC_LEVELS,
    Levels,
    candidate_thresholds,
    level_edges,
    look_up,
    running,
    running_sums,
    squared_errors,
    weighted_errors,
    without_zeros,
)


def percentile_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    percent: float = 0.99999,
    *,
    abs_max: ArrayLike | None = None,
) -> np.ndarray:
    """The |x| below which the fraction `percent` of the values lies, interpolated within its bin.

        F(T) = percent * F(infinity)

    Args:
      counts, bin_width, abs_max: as for `kl_threshold`.
      percent: in (0, 1]; 1 is no clipping.

    Returns:
      [...] thresholds, float64.

    Raises:
      ValueError: as `kl_threshold`, or `percent` outside (0, 1].

    Example:
      >>> float(percentile_threshold([4, 4, 1, 1], 1.0, 0.6))
      1.5
    """
    check_percent(percent)
    return search(
        _percentile_search, counts, bin_width, abs_max, SYMMETRIC_LEVELS, np.float64(percent)
    )


def check_percent(percent: float) -> None:
    """Raise ValueError where `percent` is not a fraction in (0, 1]."""
    if not 0.0 < percent <= 1.0:
        raise ValueError(f"percent is a fraction in (0, 1], such as 0.99999; got {percent!r}")


def mse_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The threshold with the least expected squared error of int8.

    With the counts spread evenly within each bin the error is exact, rounding and clipping alike.
    Quantization rounds |x| up by half a step at most and saturates at T = L s (L levels); summing
    (x - k s)**2 over the levels k by parts, with level edges e_k = (k - 1/2) s, leaves

        n mse(T) = sum (x - T)**2 - 2 s sum_{k=1}^{L} G(e_k)

    Exact zeros have no error: as in `kl_threshold`, what bin 0 holds in excess of bin 1 counts
    as such.  Candidates are T = 1, 2, 3, ... bins, up to no clipping.

    Args: as for `kl_threshold`.

    Returns:
      [...] thresholds, float64; the largest in a tie.

    Example:
      >>> float(mse_threshold([0, 0, 0, 9], 1.0))
      4.0
    """
    return search(_mse_search, counts, bin_width, abs_max, levels)


def _mse_search(h: jax.Array, limit: jax.Array, levels: Levels) -> jax.Array:
    return _least_error(h, limit, levels, 1.0)


def _least_error(h: jax.Array, limit: jax.Array, levels: Levels, weight: float) -> jax.Array:
    candidates = candidate_thresholds(h, limit)
    # Zeros have no error at any threshold, so that they decide nothing.
    (errors,) = weighted_errors(without_zeros(h), candidates, limit, levels, weight)
    return _largest_of_least(errors, candidates)


def _largest_of_least(errors: jax.Array, candidates: jax.Array) -> jax.Array:
    """The largest of the candidates with the least error: in a tie less is clipped."""
    # Running sums in float64 tell errors apart no finer than this.
    best = errors <= jnp.min(errors) * (1 + 1e-12)
    return jnp.max(jnp.where(best, candidates, 0.0))


def _percentile_search(
    h: jax.Array, limit: jax.Array, levels: Levels, percent: jax.Array
) -> jax.Array:
    below = running(h)
    target = percent * below[-1]
    # The first bin in which the fraction is reached; within it values are spread evenly.
    j = jnp.argmax(below[1:] >= target)
    inside = (target - below[j]) / jnp.maximum(h[j], 1.0)
    return jnp.minimum(j.astype(h.dtype) + jnp.minimum(inside, 1.0), limit)


def emd_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The threshold that moves the mean and the standard deviation of |x| least.

        |E q - E|x|| + |std q - std |x||        with q the quantized |x|

    Candidates are T = 1, 2, 3, ... bins, up to no clipping.  Paddle's observer of this name
    compares the same two moments, of the best single batch and with negatives set to zero.

    Args: as for `kl_threshold`.

    Returns:
      [...] thresholds, float64; the largest in a tie.

    Example:
      >>> float(emd_threshold([0, 0, 0, 9], 1.0))
      4.0
    """
    return search(_emd_search, counts, bin_width, abs_max, levels)


def ptf_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The power of two times the largest |x| with the least expected squared error.

        T = abs_max / 2**a,  a = 0, 1, 2, 3

    Args: as for `kl_threshold`.

    Returns:
      [...] thresholds, float64; the largest in a tie.

    Example:
      >>> float(ptf_threshold([0, 0, 0, 9], 1.0))
      4.0

    References:
      Y. Lin et al., FQ-ViT: Post-Training Quantization for Fully Quantized Vision Transformer,
      2022, for the powers of two; there they are for the channels of a LayerNorm's input.
    """
    return search(_ptf_search, counts, bin_width, abs_max, levels)


def auto_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The threshold with the least rounding error and clipping error, clipping weighing 16 times.

        E[rounding error**2] + 16 E[clipping error**2]

    Candidates are T = 1, 2, 3, ... bins, up to no clipping: whatever any other search chooses is
    among them.  `kl_threshold` tells why clipping weighs more in what follows a tensor.

    Args: as for `kl_threshold`.

    Returns:
      [...] thresholds, float64; the largest in a tie.

    Example:
      >>> float(auto_threshold([0, 0, 0, 9], 1.0))
      4.0
    """
    return search(_auto_search, counts, bin_width, abs_max, levels)


def _emd_search(h: jax.Array, limit: jax.Array, levels: Levels) -> jax.Array:
    candidates = candidate_thresholds(h, limit)
    sums = running_sums(without_zeros(h))
    below = look_up(sums, level_edges(candidates, levels, h.shape[0]))
    # Sums by parts: each value counts once for every level that it reaches.
    k = levels.numbers
    above = jnp.where(k <= levels.steps, sums.total[0] - below.counts, 0.0)  # [C, K], of level k on
    step = candidates / levels.steps
    total = jnp.maximum(jnp.sum(h), 1.0)
    mean = step * jnp.sum(above, axis=1) / total  # sum over the values of their level
    square = step**2 * jnp.sum(above * (2 * k - 1), axis=1) / total
    j = jnp.arange(h.shape[0], dtype=h.dtype)
    true_mean = jnp.sum(sums.h * (j + 0.5)) / total
    # Of values spread over a bin, as in `squared_errors`.
    true_square = jnp.sum(sums.h * (j * (j + 1) + 1 / 3)) / total
    moved = jnp.abs(mean - true_mean) + jnp.abs(
        _deviation(mean, square) - _deviation(true_mean, true_square)
    )
    return _largest_of_least(moved, candidates)


def _deviation(mean: jax.Array, square: jax.Array) -> jax.Array:
    # Rounding may bring a variance of nothing below zero.
    return jnp.sqrt(jnp.maximum(square - mean**2, 0.0))


def _ptf_search(h: jax.Array, limit: jax.Array, levels: Levels) -> jax.Array:
    # The exact largest value over powers of two: shifts in place of factors.
    candidates = limit / 2.0 ** jnp.arange(4, dtype=h.dtype)
    sums = running_sums(without_zeros(h))
    below = look_up(sums, level_edges(candidates, levels, h.shape[0]))
    errors = squared_errors(sums, candidates, below, levels)
    return _largest_of_least(errors, candidates)


def _auto_search(h: jax.Array, limit: jax.Array, levels: Levels) -> jax.Array:
    return _least_error(h, limit, levels, CLIPPING_WEIGHT)
