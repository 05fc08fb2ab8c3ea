"""The warning of an int8 model that is far from the float model: where its outputs are lost.

A site's SQNR with both models run whole is no better than that of what it reads, so the sites
behind a bad one look bad too, and the last ones worst.  What tells is where it falls along the
network, and what a site does by itself, behind the float model.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxquant.analysis.advice import GOOD_DB
from jaxquant.analysis.flow import find_flow
from jaxquant.graph.model import FloatModel
from jaxquant.plan.bind import bind
from jaxquant.plan.binding import Binding
from jaxquant.plan.grid import SMALLEST_SCALE
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import INT8, Plan
from jaxquant.report.report import Report

POOR_SQNR = 5.0  # dB of the outputs, below which a quantization warns
OUTPUTS = "the outputs"
_CLEAN = 40.0  # dB: more than int8 has, so that a fall from there is no loss
_LEAST = 3.0  # dB of a fall that is named beside the largest
_NAMED = 3


class Fall(NamedTuple):
    """Where the SQNR falls, from `before`, of what a site reads, to `after`, of its output; in dB.

    `before` is infinite behind the model's inputs.  `feeding` are the nearest sites before it.
    `name` is `OUTPUTS` for what follows the last sites.
    """

    name: str
    before: float
    after: float
    feeding: tuple[str, ...]

    @property
    def size(self) -> float:
        """How far it falls, in dB; what is above a clean signal does not count."""
        return min(self.before, _CLEAN) - min(self.after, _CLEAN)


def _warn_of_lost_columns(report: Report) -> None:
    """Warn of columns of outputs that int8 makes one value: the SQNR of all may look well."""
    lost = [f"{row['name']}[..., {k}]" for row in report.outputs for k in row["lost_columns"]]
    if not lost:
        return
    shown = ", ".join(lost[:_NAMED]) + (f" and {len(lost) - _NAMED} more" if lost[_NAMED:] else "")
    warnings.warn(
        f"columns of the quantized model's outputs are one value on the first batch, where those "
        f"of the float model vary: {shown}. They share a scale with far larger values; skip=(...) "
        "on the sites that give them, or give them a layer of their own. See qapply.report()",
        stacklevel=5,
    )


def warn_if_poor(
    source: FloatModel,
    plan: Plan,
    report: Report,
    inputs: tuple[Any, ...],
) -> None:
    """Warn where the int8 model is far from the float model, with the sites to look at.

    Args:
      source: the float model.
      plan: of the int8 model.
      report: of it, on `inputs`.
      inputs: the first calibration batch.
    """
    output = report.summary["output_sqnr_db"]
    if output is None:
        return

    # Good outputs may still hide a column.
    if output >= POOR_SQNR:
        _warn_of_lost_columns(report)
        return
    sqnr, own = (_of_layers(report, key) for key in ("sqnr_db", "own_sqnr_db"))
    found = falls(bind(source.trace(inputs), plan), sqnr, output)
    # The largest fall always, others only where they are large too.
    shown = [fall for fall in found[:_NAMED] if fall is found[0] or fall.size >= _LEAST]
    at = "; ".join(_spell(fall, own.get(fall.name)) for fall in shown)
    warnings.warn(
        f"the quantized model's outputs have an SQNR of only {output:.1f} dB on the first batch. "
        f"Along the network it falls most at {at}. See qapply.report(); "
        f"{_advice(shown, own, report)}",
        stacklevel=5,  # the caller of the public function, behind its check of keywords
    )


def falls(binding: Binding, sqnr: Mapping[str, float], output: float) -> list[Fall]:
    """Where the SQNR falls along the network, the largest fall first.

    Args:
      binding: of the int8 model.
      sqnr: site, inside a scan over stacked weights each layer of it, "NAME[3]" -> that of its
        output in dB, both models run whole.
      output: that of the model's outputs.
    """
    flow = find_flow(binding, sqnr)
    feeding = {name: p.feeding(read) for p in flow.walk() for name, read in p.inputs.items()}
    feeding[OUTPUTS] = flow.feeding([x for x in flow.graph.outputs if isinstance(x, int)])
    after = {**sqnr, OUTPUTS: output}

    # What a site reads is as good as the worst of the sites that feed it.
    found = [
        Fall(name, min((sqnr[each] for each in names), default=math.inf), after[name], names)
        for name, names in feeding.items()
    ]
    return sorted(found, key=lambda fall: -fall.size)


def _of_layers(report: Report, key: str) -> dict[str, float]:
    """What the rows of a report say of every site, of one with layers of each of them."""
    rows = [each for row in report.rows for each in row["by_layer"] or [row]]
    return {row["name"]: row[key] for row in rows if row[key] is not None}


def _spell(fall: Fall, own: float | None) -> str:
    start = "" if math.isinf(fall.before) else f"from {fall.before:.1f} "
    alone = "" if own is None else f", {own:.1f} dB by its own error alone"
    return f"{fall.name} ({start}to {fall.after:.1f} dB{alone})"


def _advice(shown: Sequence[Fall], own: Mapping[str, float], report: Report) -> str:
    """What may help: at the sites that are bad by themselves, else before the largest fall."""
    rows = {row["name"]: row for row in report.rows}
    tiny = [name for name in rows if _is_below_float32(rows[name])]

    # Nothing else helps where the scales are flushed to zero.
    if tiny:
        return (
            f"one step of the sums of {', '.join(tiny[:_NAMED])} is worth less than "
            f"{SMALLEST_SCALE:.2g}, the least float32 that programs compute with: scale the input "
            "or the weight"
        )
    sites = {each["name"]: row for row in report.rows for each in row["by_layer"] or [row]}
    # A site that is bad by itself is the cause; one that is not suffers from what comes before.
    bad = [fall.name for fall in shown if own.get(fall.name, math.inf) < GOOD_DB]
    start = "" if bad else "the error of what it reads is small and grows there: "
    if not bad:
        # Sites in float cannot be the cause, and skipping them changes nothing.
        before = [name for name in shown[0].feeding if sites[name]["status"] == INT8]
        bad = before or [shown[0].name]
    return start + MODES[report.summary["mode"]].advice.format(skip=tuple(bad))


def _is_below_float32(row: Mapping[str, Any]) -> bool:
    """True for a site whose multipliers are taken for zero."""
    if not row["threshold"] or not row["weight_scale_max"]:
        return False
    # 127 levels, as the largest step of a symmetric grid has it.
    return bool(row["threshold"] / 127 * row["weight_scale_max"] < SMALLEST_SCALE)
