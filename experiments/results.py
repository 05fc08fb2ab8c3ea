"""What an experiment leaves behind: figures, a table on the screen, files in its work folder."""

import json
from pathlib import Path
from typing import Any

import jaxquant
from experiments.accuracy.intervals import paired_difference
from experiments.evaluate import Evaluation, agreement, sqnr_db, topk_accuracy, topk_correct
from experiments.files import write_text


def measurements(
    fp32: Evaluation, int8: Evaluation, sites: dict[str, int], calibration_seconds: float
) -> dict[str, Any]:
    """Every figure of a quantization, under the names that metrics.jsonl has.

    Args:
      fp32: of the float model.
      int8: of the int8 model, on the same images.
      sites: the summary of the library's report.
      calibration_seconds: for calibration and quantization.
    """

    def of(evaluation: Evaluation, size: int) -> dict[str, float]:
        return {
            "top1": topk_accuracy(evaluation, 1),
            "top5": topk_accuracy(evaluation, 5),
            "megabytes": size / 1e6,
            "seconds": evaluation.seconds,
        }

    return {
        "fp32": of(fp32, sites["bytes_before"]),
        "int8": of(int8, sites["bytes_after"]),
        "top1_loss": loss(fp32, int8, 1),
        "top5_loss": loss(fp32, int8, 5),
        "agreement": agreement(fp32.logits, int8.logits),
        "sqnr_db": sqnr_db(fp32.logits, int8.logits),
        "sites_int8": sites["sites_int8"],
        "sites_float": sites["sites_float"],
        "calibration_seconds": calibration_seconds,
        "images": len(fp32.labels),
    }


def loss(fp32: Evaluation, int8: Evaluation, k: int) -> dict[str, float]:
    """What int8 loses of the top-k accuracy, in points, with its 95 % interval.

    `lost` images have the label among the k first classes of float32 alone, `gained` images among
    those of int8 alone.
    """
    before, after = topk_correct(fp32, k), topk_correct(int8, k)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    interval = paired_difference(lost, gained, len(before))
    return {
        "points": 100 * (lost - gained) / len(before),
        "low": 100 * interval.low,
        "high": 100 * interval.high,
        "lost": lost,
        "gained": gained,
    }


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
    top1 = result["top1_loss"]
    singles = [
        ("top-1 loss, 95 % interval", f"{top1['low']:.2f} to {top1['high']:.2f}"),
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


def write(workdir: Path, config: dict[str, Any], result: dict[str, Any], qapply: Any) -> None:
    """Writes config.json, metrics.jsonl (one line per measurement) and the library's report."""
    report = qapply.report()
    metrics = [
        {"measurement": name, **(value if isinstance(value, dict) else {"value": value})}
        for name, value in result.items()
    ]
    write_text(workdir / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(workdir / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
    write_text(workdir / "report.txt", f"{report}\n")
    details = {"summary": report.summary, "rows": report.rows}
    write_text(workdir / "report.json", json.dumps(details, indent=2, default=float) + "\n")
    page = workdir / "report.html"
    jaxquant.report_html(page, qapply, title=config["model"], progress=config["progress"])
