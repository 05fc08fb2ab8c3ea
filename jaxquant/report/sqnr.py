"""Signal to quantization noise of every site's output, float model against int8 model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from jaxquant.recover.compare import Comparison
from jaxquant.recover.shift import Powers


def measure_sqnr(
    comparison: Comparison, qparams: Any, examples: Sequence[tuple[Any, ...]]
) -> tuple[dict[str, float], float | None]:
    """The SQNR in dB of every site's output and of the model's outputs, over some batches.

    Both models run whole, so the noise of earlier sites counts: 10 log10(Σ y² / Σ (y - ŷ)²).  A
    site's output is taken behind the affine part of its epilogue.

    Returns:
      Site name -> SQNR, without the sites inside control flow; and the SQNR of all float outputs
      of the model together, None where it has none.  Minus infinity where the int8 model gives NaN
      or infinity and the float model does not.
    """
    measured = [comparison(qparams, inputs, correct=False) for inputs in examples]
    sites_db = {name: _ratio(m.sites[name] for m in measured) for name in measured[0].sites}
    outputs = [powers for m in measured for powers in m.outputs]
    return sites_db, _ratio(outputs) if outputs else None


def _ratio(powers: Iterable[Powers]) -> float:
    signal, noise = (float(sum(map(float, p))) for p in zip(*powers, strict=True))
    return decibel(signal, noise)


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
