"""What a site's error comes from, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GOOD_DB = 20.0  # of a site's own SQNR: nothing to do there
WEIGHTS, CLIPPING, OUTLIERS, ROUNDING, NONE = "weights", "clipping", "outliers", "rounding", ""

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
    """What most of a site's own error comes from; "" where the error is small.

    Args:
      row: of an `Analysis`: own_db, weight_db, input_db, clipped_noise, peak.
    """
    if row["own_db"] >= GOOD_DB:
        return NONE
    weights, inputs = row["weight_db"], row["input_db"]
    if weights is None and inputs is None:
        return ROUNDING
    if weights is not None and (inputs is None or weights < inputs):
        return WEIGHTS
    if row["clipped_noise"] > 0.5:
        return CLIPPING
    return OUTLIERS if row["peak"] > 16 else ROUNDING
