"""Signal to quantization noise of every site's output, float model against int8 model."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxquant.recover.columns import Columns, join
from jaxquant.recover.compare import Comparison
from jaxquant.recover.shift import Powers


class Outputs(NamedTuple):
    """How well the outputs of a model are kept.

    Attributes:
      sqnr_db: of all float outputs together.
      rows: one dict for each of them: name (its path in what the model returns), sqnr_db,
        worst_column (an index of its last axis), worst_column_db (its SQNR), lost_columns (those
        that vary in the float model and are one value in int8); None and [] below two axes.
    """

    sqnr_db: float
    rows: list[dict[str, Any]]


def measure_sqnr(
    comparison: Comparison, qparams: Any, examples: Sequence[tuple[Any, ...]]
) -> tuple[dict[str, float], Outputs | None]:
    """The SQNR in dB of every site's output and of the model's outputs, over some batches.

    Both models run whole, so the noise of earlier sites counts: 10 log10(Σ y² / Σ (y - ŷ)²).  A
    site's output is taken behind the affine part of its epilogue.

    Returns:
      Site name -> SQNR, without the sites inside control flow; and that of the float outputs of the
      model, None where it has none.  Minus infinity where the int8 model gives NaN or infinity and
      the float model does not.
    """
    measured = [comparison(qparams, inputs, correct=False) for inputs in examples]
    sites_db = {name: _ratio(m.sites[name] for m in measured) for name in measured[0].sites}
    powers = [each for m in measured for each in m.outputs]
    if not powers:
        return sites_db, None
    rows = [
        _output_row(name, _ratio(m.outputs[k] for m in measured), [m.columns[k] for m in measured])
        for k, name in enumerate(comparison.output_names)
    ]
    return sites_db, Outputs(_ratio(powers), rows)


def _output_row(name: str, sqnr_db: float, batches: Sequence[Columns]) -> dict[str, Any]:
    columns = functools.reduce(join, batches)
    kept = columns.sqnr_db
    row = {"name": name, "sqnr_db": sqnr_db, "worst_column": None, "worst_column_db": None}
    if not np.isnan(kept).all():
        worst = int(np.nanargmin(kept))
        row |= {"worst_column": worst, "worst_column_db": float(kept[worst])}
    return row | {"lost_columns": [int(k) for k in np.flatnonzero(columns.lost)]}


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
