"""The result of an analysis: plain data, as text, HTML and JSON."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.analysis.advice import ADVICE
from jaxquant.calibration.observations import TensorStats
from jaxquant.report.report import without_infinity
from jaxquant.report.table import html_table, text_table

_COLUMNS = (
    ("rank", "rank"),
    ("site", "name"),
    ("kind", "kind"),
    ("own dB", "own_db"),
    ("so far dB", "accumulated_db"),
    ("clipped %", "clipped"),
    ("dead", "dead_channels"),
    ("lost", "lost_channels"),
    ("cause", "cause"),
)
_SCORED = (("alone", "alone_drop"), ("left float", "float_gain"))
_TEXT = ("name", "kind", "cause")
_SHOWN = 20  # rows of the text; all are in `rows`


@dataclasses.dataclass(frozen=True, eq=False)
class TensorAnalysis:
    """A quantized tensor on the data.

    Attributes:
      stats: the histogram of |x|, the extremes, the count.
      threshold: the |x| that the largest step stands for.
      levels: the steps between zero and the threshold.
      low, high: [batches], the extremes of each batch.
      clipped: the fraction of the values beyond the grid.
    """

    stats: TensorStats
    threshold: float
    levels: int
    low: np.ndarray = dataclasses.field(repr=False)
    high: np.ndarray = dataclasses.field(repr=False)
    clipped: float


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """What `jaxquant.analyze` found.

    Attributes:
      rows: one dict per int8 site, in network order.  `own_*` are of the site alone, its inputs
        those of the float model; `accumulated_*` of the int8 model run whole, up to the site.
        name, kind; rank (1: the worst); own_sqnr_db, accumulated_sqnr_db: 10 log10(Σ y² / Σ (y -
        ŷ)²) of its output; own_db, accumulated_db: the mean over the samples of each one's own
        SQNR, which a few samples of large values do not hide; own_cosine, accumulated_cosine;
        clipped: the fraction of its input beyond the threshold, and clipped_noise: how much of
        that input's noise it is; threshold; low, high: the extremes of the input, and low_spread,
        high_spread: how far they vary from batch to batch; input_db, weight_db: of the quantized
        input and weight themselves; channels, dead_channels (constant in the float model),
        lost_channels (constant in int8 alone): of its output; cause: "weights", "clipping",
        "outliers", "rounding", "" for a site that is well.  With a metric: alone_score and
        alone_drop (the site alone in int8), float_score and float_gain (the site alone in float),
        effect (the mean of drop and gain).  place: along the network.
        Of a site inside a scan over stacked weights they are of the worst layer, but for the
        metric, for which all its layers change at once: worst_layer is its name, "NAME[3]", and
        by_layer has the row of each.  In another loop they are of all its steps.
        None where a value does not exist.
      tensors: name -> `TensorAnalysis` of each quantized tensor, with layers of each of them.
      weights: site, with layers each of them -> [C], the largest magnitude of each output channel
        of its weight.
      summary: sites, batches, output_sqnr_db, output_db; with a metric: float_score, int8_score,
        curve (a list of [sites in float, int8 share of the sites, score]).
    """

    rows: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, TensorAnalysis]
    weights: Mapping[str, np.ndarray]
    summary: Mapping[str, Any]

    @property
    def ranking(self) -> list[str]:
        """The names of the sites, the worst first: by the metric, or by `own_db` without one."""
        return [row["name"] for row in self.worst]

    @property
    def worst(self) -> list[Mapping[str, Any]]:
        """The rows, the worst first."""
        return sorted(self.rows, key=lambda row: row["rank"])

    @property
    def along(self) -> list[Mapping[str, Any]]:
        """The rows in network order, of a site with layers one for each of them."""
        found = [layer for row in self.rows for layer in row["by_layer"] or [row]]
        return sorted(found, key=lambda row: row["place"])

    @property
    def has_scores(self) -> bool:
        """True where a metric was given."""
        return "curve" in self.summary

    def advice(self, sites: int = 5) -> list[str]:
        """What to do about the worst sites, a sentence each; [] where all are well."""
        found = []
        for row in self.worst[:sites]:
            if row["cause"]:
                found.append(f"{where(row)}: {ADVICE[row['cause']]}")
        return found

    def __str__(self) -> str:
        return f"{text_table(self._cells(_SHOWN), self._right())}\n\n{self._footer()}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(self._cells(len(self.rows)), self._right())
        return f"{table}<pre>{html.escape(self._footer())}</pre>"

    def to_json(self) -> str:
        """Rows and summary as JSON; what is infinite becomes null."""
        plain = {
            "summary": without_infinity(self.summary),
            "rows": [without_infinity(row) for row in self.rows],
        }
        return json.dumps(plain, indent=1)

    def _columns(self) -> tuple[tuple[str, str], ...]:
        return (*_COLUMNS[:-1], *(_SCORED if self.has_scores else ()), _COLUMNS[-1])

    def _right(self) -> list[bool]:
        return [key not in _TEXT for _, key in self._columns()]

    def _cells(self, shown: int) -> list[list[str]]:
        columns = self._columns()
        lines = [[_cell(row, key) for _, key in columns] for row in self.worst[:shown]]
        return [[title for title, _ in columns], *lines]

    def _footer(self) -> str:
        summary = self.summary
        lines = []
        if len(self.rows) > _SHOWN:
            lines.append(f"The worst {_SHOWN} of {len(self.rows)} sites; .rows has all.")
        if summary["output_sqnr_db"] is not None:
            lines.append(
                f"Outputs: {summary['output_sqnr_db']:.1f} dB SQNR, {summary['output_db']:.1f} dB "
                f"for an ordinary sample, over {summary['batches']} batches."
            )
        if self.has_scores:
            lines.append(
                f"Metric: float {summary['float_score']:.6g}, int8 {summary['int8_score']:.6g}."
            )
        if any(row["by_layer"] for row in self.worst[:_SHOWN]):
            lines.append('Of a site with layers the worst one is shown; "by_layer" has all.')
        lines += self.advice() or ["No site stands out."]
        return "\n".join(lines)


def where(row: Mapping[str, Any]) -> str:
    """The site that a row of an `Analysis` tells of; of one with layers the worst layer."""
    return str(row["worst_layer"] or row["name"])


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = where(row) if key == "name" else row[key]
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    if key == "clipped":
        return f"{100 * value:.3g}"
    return f"{value:.4g}" if key in ("alone_drop", "float_gain") else f"{value:.1f}"
