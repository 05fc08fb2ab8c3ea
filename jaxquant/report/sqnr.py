"""Signal to quantization noise of every site's output, float model against int8 model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxquant.recover.bias_correction import with_shifts
from jaxquant.recover.columns import Columns
from jaxquant.recover.compare import Comparison, Measured
from jaxquant.run.layers import Layer


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


class Quality(NamedTuple):
    """How far an int8 model is from the float model; 10 log10(Σ y² / Σ (y - ŷ)²) in dB throughout.

    Minus infinity where the int8 model gives NaN or infinity and the float model does not.

    Attributes:
      sites: site -> SQNR of its output, both models run whole, so that the noise of earlier sites
        counts; taken behind the affine part of its epilogue.  Inside a loop over all its steps, in
        which the float model says how many they are, which branch is taken and what integers are;
        inside a scan over stacked weights that of its worst layer.  Without sites that no step
        showed, and float ones in a loop or branch that has no int8 site.
      own: int8 site -> likewise, where it reads what the float model gives; in a model whose biases
        are corrected, with the correction that it would have there.  Without sites that only move
        integers.
      layers, own_layers: of the sites inside scans over stacked weights the same for each layer,
        by its numbers in the scans around it, outermost first.
      outputs: of the float outputs of the model; None where it has none.
    """

    sites: Mapping[str, float]
    own: Mapping[str, float]
    outputs: Outputs | None
    layers: Mapping[str, Mapping[Layer, float]] = MappingProxyType({})
    own_layers: Mapping[str, Mapping[Layer, float]] = MappingProxyType({})


UNKNOWN = Quality({}, {}, None)


def measure_quality(
    comparison: Comparison, qparams: Any, inputs: tuple[Any, ...], uncorrected: Any = None
) -> Quality:
    """Compare both models on one batch.

    Args:
      comparison: of the two.
      qparams: the int8 model's arrays.
      inputs: the batch.
      uncorrected: the same before bias correction; None without that step.  A corrected bias takes
        away the mean error that has gathered up to its site, so a site behind a bad one would look
        bad by itself: its bias expects what the bad one does.
    """
    measured = comparison(qparams, inputs)
    if uncorrected is not None:
        # Biases for each site alone: corrected behind what the float model gives it.
        shifts = comparison(uncorrected, inputs, alone=True).shifts
        qparams = with_shifts(comparison.plan, uncorrected, [shifts])
    # Three runs in all, of one compiled step: what it does is chosen by its arguments.
    alone = comparison(qparams, inputs, alone=True)
    with_error = comparison.with_error
    layers = _layers(measured)
    own_layers = {name: each for name, each in _layers(alone).items() if name in with_error}
    own = {name: x for name, x in _sites(alone).items() if name in with_error}
    return Quality(
        sites=_sites(measured) | _worst(layers),
        own=own | _worst(own_layers),
        outputs=_outputs(comparison, measured),
        layers=layers,
        own_layers=own_layers,
    )


def _sites(measured: Measured) -> dict[str, float]:
    return {name: decibel(*powers) for name, powers in measured.sites.items()}


def _layers(measured: Measured) -> dict[str, dict[Layer, float]]:
    return {
        name: {layer: decibel(*powers) for layer, powers in layers.items()}
        for name, layers in measured.layers.items()
    }


def _worst(layers: Mapping[str, Mapping[Layer, float]]) -> dict[str, float]:
    return {name: min(each.values()) for name, each in layers.items() if each}


def _outputs(comparison: Comparison, measured: Measured) -> Outputs | None:
    if not measured.outputs:
        return None
    rows = [
        _output_row(name, decibel(*powers), columns)
        for name, powers, columns in zip(
            comparison.output_names, measured.outputs, measured.columns, strict=True
        )
    ]
    # Powers add up over outputs; decibels do not.
    signal, noise = (sum(part) for part in zip(*measured.outputs, strict=True))
    return Outputs(decibel(signal, noise), rows)


def _output_row(name: str, sqnr_db: float, columns: Columns) -> dict[str, Any]:
    kept = columns.sqnr_db
    row = {"name": name, "sqnr_db": sqnr_db, "worst_column": None, "worst_column_db": None}
    # A column of zeros has no signal to compare.
    if not np.isnan(kept).all():
        worst = int(np.nanargmin(kept))
        row |= {"worst_column": worst, "worst_column_db": float(kept[worst])}
    return row | {"lost_columns": [int(k) for k in np.flatnonzero(columns.lost)]}


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite where there is no noise."""
    if noise == 0:
        return math.inf
    # No signal, or an int8 model that overflowed.
    if signal == 0 or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)
