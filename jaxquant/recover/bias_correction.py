"""Bias correction: take away the mean error that quantization leaves in each output channel.

M. Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, 2019,
section 4.2; here the error is measured on calibration data, sites in order, each behind the
corrected ones before it.  The paper's error is that of the pre-activations.  Where an activation
flattens them (most of what a ReLU sees is negative) their mean says little of what goes on, so the
mean is weighted by the activation's slope; see `jaxquant.recover.compare.Shift`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.recover.compare import Comparison, Shift


def correct_biases(
    comparison: Comparison, qparams: Any, examples: Sequence[tuple[Any, ...]]
) -> Any:
    """`qparams` with the biases of all int8 sites that have a weight corrected.

    Args:
      comparison: both models.
      qparams: the int8 model's arrays; left as they are.
      examples: batches of calibration samples; they weigh by their sizes.
    """
    total: dict[str, Shift] | None = None
    for inputs in examples:
        shifts = comparison(qparams, inputs, correct=True).shifts
        total = shifts if total is None else jax.tree.map(jnp.add, total, shifts)
    return with_shifts(qparams, total or {})


def with_shifts(qparams: Any, shifts: Mapping[str, Shift]) -> Any:
    """`qparams` with the mean of each site's shift added to its bias."""
    sites = dict(qparams["sites"])
    for name, shift in shifts.items():
        arrays = sites[name]
        step = shift.mean().reshape(arrays["multiplier"].shape)
        sites[name] = {**arrays, "bias": arrays.get("bias", jnp.float32(0)) + step}
    return {**qparams, "sites": sites}
