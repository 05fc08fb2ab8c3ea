"""What to do next with an int8 model, from its report and its analysis."""

from __future__ import annotations

from jaxquant.analysis.advice import GOOD_DB
from jaxquant.analysis.analysis import Analysis
from jaxquant.plan.plan import FLOAT
from jaxquant.report.report import Report

_FAR = 10.0  # dB of the outputs, below which the model needs work


def next_steps(report: Report, analysis: Analysis | None) -> list[str]:
    """Sentences, the most pressing first."""
    found = []
    summary = report.summary
    # From what the user asked for and did not get, to what may be worth a look.
    control = summary.get("control")
    if control is not None and not control["held"]:
        found.append(
            f"The metric is {control['score']:.6g}, below its target of {control['target']:.6g}: "
            "allow a larger max_drop, give more calibration data or a longer time_budget, or "
            "train on with quantization in mind."
        )
    if analysis is not None:
        found += [f"{line}." for line in analysis.advice()]
    db = summary["output_sqnr_db"]
    if db is not None and db < _FAR and analysis is None:
        found.append(
            f"The outputs have an SQNR of {db:.1f} dB, which is little: jaxquant.analyze tells "
            "which sites it is lost at."
        )
    # Named by kind, since one setting is the remedy for all of them.
    by_kind = sorted({r["kind"] for r in report.rows if "quantizable_op_type" in r["reason"]})
    if by_kind:
        found.append(
            f"Sites of the kind {', '.join(by_kind)} are float because quantizable_op_type does "
            "not list them; is_full_quantize=True makes all kinds int8."
        )
    others = [r["name"] for r in report.rows if r["status"] == FLOAT and r["kind"] not in by_kind]
    if others:
        count = "One other site is" if len(others) == 1 else f"{len(others)} other sites are"
        found.append(f"{count} float; the table has the reason of each.")
    if analysis is None:
        found.append("jaxquant.analyze(..., metric=...) adds the errors and costs of each site.")
    elif not analysis.has_scores:
        found.append("With metric= the analysis ranks the sites by what they cost your own metric.")
    if not any(row["sqnr_db"] is not None and row["sqnr_db"] < GOOD_DB for row in report.rows):
        found.append(
            "Every site is above 20 dB: jaxquant.save_quantized_model, export_onnx and "
            "export_stablehlo take the model to where it runs."
        )
    return found
