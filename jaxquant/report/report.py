"""The report of a quantization: one row per site, parameter bytes, as text, HTML and plain data."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from jaxquant.graph.kinds import LOOKUP_KIND, MEANINGS
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import FLOAT, INT8
from jaxquant.plan.rules import Rule
from jaxquant.report.table import html_table, text_table

_COLUMNS = (
    ("site", "name"),
    ("kind", "kind"),
    ("runs in", "mode"),
    ("threshold", "threshold"),
    ("weight scale", "weight_scale"),
    ("own dB", "own_sqnr_db"),
    ("SQNR dB", "sqnr_db"),
    ("epilogue", "epilogue"),
    ("rounding", "rounding"),
    ("why float", "reason"),
)
_NUMBERS = ("threshold", "weight_scale", "own_sqnr_db", "sqnr_db")
# No room; a reason has a line of its own, and so has a rounding.
_IN_HTML_ALONE = ("weight_scale", "epilogue", "rounding", "reason")
_WIDTH = 80  # characters of a line, where the terminal does not have more
_SHOWN_TENSORS = 6  # of the float ones, in the text


@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What became of every site.

    Attributes:
      rows: one dict per site: name, kind, scope, status ("int8": quantized, or "float"), mode (what
        it runs in, in words: "int8", "int8 (dynamic)": the scale of its input is computed in each
        call, "int8 weights" and "int4 weights": it computes in float, "float"), reason, threshold,
        threshold_max (inside a scan over stacked weights the least and the largest of the layers),
        weight_scale_min, weight_scale_max, own_sqnr_db (of its output with its own error alone),
        sqnr_db (with the errors before it too), by_layer (inside scans over stacked weights one
        dict for each layer: name, own_sqnr_db, sqnr_db; those of the row are of the worst layer),
        epilogue, weight_path; None where there is no such value; see
        `jaxquant.report.sqnr.Quality`; rounding (what a recovery step did with its weight, or "").
      tensors: one dict per tensor that an operation reads: name, status ("int8" | "float" |
        "fused"), reason; see `jaxquant.report.coverage`.
      summary: sites_int8, sites_float, kinds (kind -> numbers of int8 and float sites),
        tensors_int8, tensors_float, output_sqnr_db (of the model's float outputs on the first
        calibration batch), bytes_before, bytes_after, algo, weight_quantize_type, mode ("static" |
        "dynamic" | "weight_only"), group_size (None: a scale per channel), backend,
        read_dequantized (the parameters that are stored as integers alone and read in float too),
        recovery (step -> what it did); with a metric: control, see `jaxquant.tune.control`; rules,
        those that accuracy control or optimize_for="speed" found: see `rules`.
      outputs: one dict per float output of the model, on the first calibration batch: name,
        sqnr_db, worst_column, worst_column_db, lost_columns; see `jaxquant.report.sqnr.Outputs`.
    """

    rows: Sequence[Mapping[str, Any]]
    tensors: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    outputs: Sequence[Mapping[str, Any]] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that accuracy control and optimize_for="speed" found, beside the user's own.

        Passed back as `rules`, they make the same choices without a search.
        """
        return tuple(Rule(**rule) for rule in self.summary.get("rules", ()))

    def __str__(self) -> str:
        # No narrower than 80: names would lose more than the middle.
        width = max(shutil.get_terminal_size((_WIDTH, 24)).columns, _WIDTH)
        columns = [column for column in _COLUMNS if column[1] not in _IN_HTML_ALONE]
        # Reasons go below their row, so that the table stays as narrow as its columns.
        head, rule, *lines = text_table(
            self._cells(columns), [key in _NUMBERS for _, key in columns], width
        ).splitlines()
        shown = [head, rule]
        for line, row in zip(lines, self.rows, strict=True):
            shown.append(line)
            for told in filter(None, (row["reason"], row["rounding"])):
                shown.append(_wrapped(f"    {told}", width))
        told = [_wrapped(line, width) for line in self._footer().splitlines()]
        return "\n".join([*shown, "", *told, *(_wrapped(x, width) for x in self._legend())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        dim = [row["status"] != INT8 for row in self.rows]
        is_told = any(row["rounding"] for row in self.rows)
        columns = [column for column in _COLUMNS if column[1] != "rounding" or is_told]
        # Numbers are set to the right, as in the text.
        right = [key in _NUMBERS for _, key in columns]
        cells = self._cells(columns)
        return f"{html_table(cells, right, dim)}<pre>{html.escape(self._footer())}</pre>"

    def _cells(self, columns: Sequence[tuple[str, str]]) -> list[list[str]]:
        head = [title for title, _ in columns]
        return [head, *([_cell(row, key) for _, key in columns] for row in self.rows)]

    def to_json(self) -> str:
        """Rows and summary as JSON; an infinite SQNR becomes null."""
        plain = {
            "summary": without_infinity(self.summary),
            "rows": [without_infinity(row) for row in self.rows],
            "tensors": list(self.tensors),
            "outputs": [without_infinity(row) for row in self.outputs],
        }
        return json.dumps(plain, indent=1)

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame, one row for each site.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self.rows))

    def _legend(self) -> list[str]:
        """What the columns and the kinds mean whose names do not say it."""
        used = {row["kind"] for row in self.rows}
        meanings = "; ".join(f"{k}: {text}" for k, text in MEANINGS.items() if k in used)
        columns = (
            "SQNR dB: at the site's output, with all errors before it; own dB: with its own alone."
        )
        return [f"({columns} Kinds: {meanings}.)" if meanings else f"({columns})"]

    def _footer(self) -> str:
        summary = self.summary
        quantized = [row for row in self.rows if row["status"] == INT8]
        quantized.sort(key=lambda row: row["kind"] == LOOKUP_KIND)  # those that compute come first
        # All sites run alike but for exceptions, so that one of them names the mode.
        label = next((row["mode"] for row in quantized), INT8)
        kinds = ", ".join(
            f"{kind} {count[INT8]}" + (f" (+{count[FLOAT]} float)" if count[FLOAT] else "")
            for kind, count in summary["kinds"].items()
        )
        lines = [f"{summary['sites_int8']} sites {label}, {summary['sites_float']} float: {kinds}."]

        # Tensors that stay float among int8 sites cost time, so each is named with its reason.
        floats = [tensor for tensor in self.tensors if tensor["status"] == FLOAT]
        if not MODES[summary["mode"]].integer:
            floats = []  # they all are
        else:
            lines.append(
                f"Tensors between them: {summary['tensors_int8']} int8, "
                f"{summary['tensors_float']} float" + (":" if summary["tensors_float"] else ".")
            )
        lines += [f"  {each['name']}: {each['reason']}" for each in floats[:_SHOWN_TENSORS]]
        if len(floats) > _SHOWN_TENSORS:
            lines.append(f"  and {len(floats) - _SHOWN_TENSORS} more, see .tensors")
        if summary["output_sqnr_db"] is not None:
            lines.append(f"Outputs on the first batch: {summary['output_sqnr_db']:.1f} dB SQNR.")
            lines += output_lines(self.outputs)
        lines.append(
            f"Parameters: {summary['bytes_before']:,} bytes before, {summary['bytes_after']:,} "
            f"after ({summary['bytes_before'] / max(summary['bytes_after'], 1):.2f} times fewer). "
            f"algo={summary['algo']}, weights {summary['weight_quantize_type']}"
            + (f", in groups of {summary['group_size']}." if summary["group_size"] else ".")
        )
        if summary.get("read_dequantized"):
            names = ", ".join(summary["read_dequantized"][:_SHOWN_TENSORS])
            lines.append(f"Stored once, as integers, though read in float too: {names}.")
        if summary["recovery"]:
            did = "; ".join(f"{step}: {note}" for step, note in summary["recovery"].items())
            lines.append(f"Recovery: {did}.")
        lines += control_lines(summary["control"]) if "control" in summary else []
        if "backend" in summary and MODES[summary["mode"]].integer:
            lines.append(f"On CPU the int8 convolutions and dots are run by: {summary['backend']}.")
        return "\n".join(lines)


def output_lines(outputs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The worst of several outputs, and the worst column: sums of squares hide what is small."""
    lines = []
    noisy = [row for row in outputs if row["sqnr_db"] is not None]  # None: infinite, of a file
    if len(outputs) > 1 and noisy:
        worst = min(noisy, key=lambda row: row["sqnr_db"])
        lines.append(f"  Worst of {len(outputs)}: {worst['name']}, {worst['sqnr_db']:.1f} dB.")
    # A class whose logit is lost costs little SQNR and all of its images.
    with_columns = [row for row in outputs if row["worst_column_db"] is not None]
    if with_columns:
        worst = min(with_columns, key=lambda row: row["worst_column_db"])
        where = f" of {worst['name']}" if len(outputs) > 1 else ""
        lines.append(
            f"  Worst column: {worst['worst_column']}{where}, {worst['worst_column_db']:.1f} dB."
        )
    for row in outputs:
        if lost := row["lost_columns"]:
            shown = ", ".join(map(str, lost[:5])) + (", ..." if len(lost) > 5 else "")
            lines.append(f"  Lost in {row['name']}, one value in int8: columns {shown}.")
    return lines


def control_lines(control: Mapping[str, Any]) -> list[str]:
    """What accuracy control did, a line for each step."""
    verdict = "held" if control["held"] else "not reached"
    lines = [
        f"Metric: float {control['float_score']:.6g}, full int8 {control['int8_score']:.6g}, now "
        f"{control['score']:.6g}; the target of {control['target']:.6g} is {verdict}."
        + (" The time budget was spent." if control["out_of_time"] else "")
    ]
    for step in control["steps"]:
        kept = "kept" if step["kept"] else "not kept"
        lines.append(
            f"  {step['step']}, {step['detail']}: {step['score']:.6g} ({step['gain']:+.4g}), {kept}"
        )
    return lines


def without_infinity(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold of a row: numbers that are not finite become None."""

    def finite(value: Any) -> Any:
        # JSON has neither infinity nor NaN.
        if isinstance(value, list):
            return [without_infinity(x) if isinstance(x, Mapping) else x for x in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {key: finite(value) for key, value in values.items()}


def _wrapped(line: str, width: int) -> str:
    """A line in as many as it takes, the others two characters further in."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.fill(
        line, width, subsequent_indent=indent + "  ", break_long_words=False, break_on_hyphens=False
    )


def _span(low: float | None, high: float | None, digits: int) -> str:
    if low is None:
        return "-"
    text = f"{low:.{digits}g}"
    return text if high is None or low == high else f"{text} to {high:.{digits}g}"


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key == "epilogue":
        return " ".join(row["epilogue"])
    if key == "weight_scale":
        return _span(row["weight_scale_min"], row["weight_scale_max"], 3)
    if key == "threshold":
        return _span(row["threshold"], row.get("threshold_max"), 4)
    value = row[key]
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if key.endswith("_db") else f"{value:.4g}"
    return str(value)
