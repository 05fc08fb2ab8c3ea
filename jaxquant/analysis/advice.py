"""What a site's error comes from, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOOD_DB = 20.0  # of a site's own SQNR: nothing to do there
COARSE_DB = 30.0  # of a weight or a tensor on its grid: values spread over the grid have 35 to 45
SHARE = 0.1  # of the metric's drop that a site costs: more is worth a remedy
WEIGHTS, CLIPPING, OUTLIERS, ROUNDING = "weights", "clipping", "outliers", "rounding"

ADVICE = {
    WEIGHTS: "its weights fill their grid badly, since a few of them are far larger than the "
    'others: recover=("equalization", "bias_correction"), or adaround; and '
    'weight_quantize_type="channel_wise_abs_max" if that is not set',
    CLIPPING: 'its input is clipped too hard: a milder threshold there (algo="abs_max" or "mse")',
    OUTLIERS: "a few values of its input are far larger than the others, which share a few steps: "
    'a threshold that clips them (algo="KL", "mse" or "hist"), recover=("equalization", ...), or '
    "the float type there (skip)",
    ROUNDING: 'its error is spread evenly: recover=("adaround", ...), or the float type there '
    "(skip)",
}


def cause(row: Mapping[str, Any]) -> str:
    """What most of a site's own error comes from.

    Args:
      row: of an `Analysis`: weight_db, input_db, clipped_noise.
    """
    weights, inputs = row["weight_db"], row["input_db"]
    # Whichever fits its grid worse has most of the noise: both enter the product alike.
    if weights is not None and (inputs is None or weights < inputs):
        return WEIGHTS if weights < COARSE_DB else ROUNDING
    if inputs is None:
        return ROUNDING
    # Noise of values beyond the grid is of the threshold, the rest is of the step.
    if row["clipped_noise"] > 0.5:
        return CLIPPING
    return OUTLIERS if inputs < COARSE_DB else ROUNDING


def matters(row: Mapping[str, Any], drop: float | None) -> bool:
    """True for a site whose error is large, or that costs much of the metric.

    Args:
      row: of an `Analysis`.
      drop: what int8 costs the metric altogether; None without a metric.
    """
    if drop is None:
        return bool(row["own_db"] < GOOD_DB)
    return bool(drop > 0 and row["effect"] > SHARE * drop)
