"""What an experiment leaves behind: a table on the screen and files in its work folder."""

import json
from pathlib import Path
from typing import Any

from experiments.files import write_text


def table(title: str, result: dict[str, Any]) -> str:
    """FP32 beside INT8, then what describes the pair.

    Args:
      title: the first line.
      result: what `experiments.quant_post.run` gives.
    """
    fp32, int8 = result["fp32"], result["int8"]
    pairs = [
        ("top-1, %", "top1", ".2f"),
        ("top-5, %", "top5", ".2f"),
        ("parameters, MB", "megabytes", ".2f"),
        ("evaluation, s", "seconds", ".1f"),
    ]
    singles = [
        ("parameters, times smaller", f"{fp32['megabytes'] / int8['megabytes']:.2f}"),
        ("agreement with FP32, %", f"{result['agreement']:.2f}"),
        ("SQNR of the logits, dB", f"{result['sqnr_db']:.2f}"),
        ("sites in int8", str(result["sites_int8"])),
        ("sites in float", str(result["sites_float"])),
        ("calibration and quantization, s", f"{result['calibration_seconds']:.1f}"),
    ]
    lines = [title, "", f"{'':32}{'FP32':>10}{'INT8':>10}{'change':>10}"]
    for label, key, form in pairs:
        a, b = fp32[key], int8[key]
        lines.append(f"{label:32}{a:>10{form}}{b:>10{form}}{b - a:>+10{form}}")
    lines += [f"{label:32}{value:>20}" for label, value in singles]
    return "\n".join(lines)


def write(workdir: Path, config: dict[str, Any], result: dict[str, Any], report: Any) -> None:
    """Writes config.json, metrics.jsonl (one line per measurement) and the library's report."""
    metrics = [
        {"measurement": name, **(value if isinstance(value, dict) else {"value": value})}
        for name, value in result.items()
    ]
    write_text(workdir / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    write_text(workdir / "report.txt", f"{report}\n")
    details = {"summary": report.summary, "rows": report.rows}
    write_text(workdir / "report.json", json.dumps(details, indent=2, default=float) + "\n")
    if hasattr(report, "_repr_html_"):
        write_text(workdir / "report.html", report._repr_html_())
