"""`jaxquant.report_html`: one self-contained page on an int8 model."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxquant._version import __version__
from jaxquant.analysis import plots
from jaxquant.analysis.analysis import Analysis, where
from jaxquant.analysis.next_steps import next_steps
from jaxquant.analysis.page_style import SCRIPT, STYLE
from jaxquant.files import atomic
from jaxquant.graph import kinds
from jaxquant.progress import Progress, Stage
from jaxquant.report.report import Report, control_lines

_OWN = "own_sqnr_db"  # of the report, on one batch; an analysis has the same of all its data
_REPORT_COLUMNS = (
    ("site", "name"),
    ("kind", "kind"),
    ("runs in", "mode"),
    ("threshold", "threshold"),
    ("own dB", _OWN),
    ("SQNR dB", "sqnr_db"),
    ("why float", "reason"),
)
_ANALYSIS_COLUMNS = (
    ("rank", "rank"),
    ("own dB", "own_db"),
    ("so far dB", "accumulated_db"),
    ("cosine", "own_cosine"),
    ("clipped %", "clipped"),
    ("dead", "dead_channels"),
    ("lost", "lost_channels"),
    ("cause", "cause"),
)
_SCORE_COLUMNS = (("alone in int8", "alone_drop"), ("float gives", "float_gain"))
_REPORT_LEGEND = [
    ("runs in", "int8, or float with the reason in the last column"),
    ("threshold", "the |x| of the site's input that maps to the largest integer"),
    ("SQNR dB", "signal to quantization noise at the site's output, all errors before it included"),
]
_OWN_LEGEND = ("own dB", "SQNR where this site alone is quantized")
_ANALYSIS_LEGEND = [
    ("rank", "1 for the site that costs most"),
    ("so far dB", "SQNR where it and all before it are"),
    ("cosine", "of the site's output in float and with this site alone quantized"),
    ("clipped %", "of the input's values beyond the threshold"),
    ("dead", "output channels that are always zero"),
    ("lost", "output channels that int8 turned into zeros"),
]
_SCORE_LEGEND = [
    ("alone in int8", "what the metric loses where this site alone is quantized"),
    ("float gives", "what it gains where this site alone stays float"),
]
_TEXTS = ("name", "kind", "mode", "reason", "cause")  # columns that hold no numbers
_DETAILED = 6  # sites with pictures of their own
_DPI = 180  # of the pictures, twice that of
_CSS_DPI = 90  # the page, so that they are sharp on every screen


def report_html(
    path: str | os.PathLike[str],
    qapply: Any,
    analysis: Analysis | None = None,
    *,
    title: str = "int8 model",
    progress: bool = True,
) -> None:
    """Write a page that tells a person how a model was quantized and what to do next.

    Summary, what to do next, a table of all sites that sorts by any column, and pictures: the SQNR
    along the network, sensitivity bars, the metric against the int8 share, and of the worst sites
    the histogram of the input with every method's threshold, and the weight range per channel.  One
    file, nothing loaded from elsewhere; written whole or not at all.

    Args:
      path: of the file.
      qapply: of `jaxquant.quant_post` or `jaxquant.load_quantized_model`.
      analysis: of `jaxquant.analyze`; None leaves out what it tells.
      title: the heading.
      progress: show what is being done, as `jaxquant.quant_post`.

    Raises:
      ImportError: matplotlib is not installed (the extra "plot").
      ValueError: `path` cannot be written to, or `qapply` has no report.

    Example:
      >>> import jax.numpy as jnp, jaxquant, pathlib, tempfile
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> params, x = {"w": jnp.eye(4)}, jnp.linspace(-1, 1, 32).reshape(8, 4)
      >>> qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
      >>> analysis = jaxquant.analyze(params, apply_fn, qparams, qapply, [x], progress=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     page = pathlib.Path(folder, "report.html")
      ...     jaxquant.report_html(page, qapply, analysis)
      ...     "SQNR of every site" in page.read_text()
      True
    """
    # Before the pictures are drawn, which takes a while.
    atomic.check_writable(path)
    report = qapply.report()
    if report is None:
        raise ValueError("this qapply has no report: quantize the model with jaxquant.quant_post")
    with Progress("report_html", progress) as shown:
        pictures = "" if analysis is None else _pictures(analysis, shown)
        with shown.stage("writing"):
            atomic.write_file(path, [_page(report, analysis, title, pictures).encode()])


def _page(report: Report, analysis: Analysis | None, title: str, pictures: str) -> str:
    steps = "".join(f"<li>{html.escape(step)}</li>" for step in next_steps(report, analysis))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<h1>{html.escape(title)}</h1>",
            _cards(report, analysis),
            f"<h2>What to do next</h2><ul>{steps}</ul>",
            _control(report),
            "<h2>Sites</h2><p>Click a column's head to sort by it.</p>",
            _legend(report, analysis),
            _table(report, analysis),
            pictures,
            f"<footer>jaxquant {html.escape(__version__)}</footer>",
            f"</main><script>{SCRIPT}</script></body></html>",
        ]
    )


def _cards(report: Report, analysis: Analysis | None) -> str:
    summary = report.summary
    cards = [
        (
            "sites in int8",
            f"{summary['sites_int8']} of {summary['sites_int8'] + summary['sites_float']}",
        ),
        ("size", f"{_bytes(summary['bytes_before'])} → {_bytes(summary['bytes_after'])}"),
        ("smaller", f"{summary['bytes_before'] / max(summary['bytes_after'], 1):.2f} ×"),
    ]
    if summary["output_sqnr_db"] is not None:
        cards.append(("SQNR of the outputs", f"{summary['output_sqnr_db']:.1f} dB"))
    # Accuracy control has measured the model that is returned; the analysis one without it.
    scores: Mapping[str, Any] = summary.get("control") or {}
    if analysis is not None and analysis.has_scores and not scores:
        scores = analysis.summary
    if scores:
        now = scores.get("score", scores["int8_score"])
        cards.append(("metric, float → int8", f"{scores['float_score']:.4g} → {now:.4g}"))
    cards.append(("thresholds", str(summary["algo"])))
    body = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>"
        for name, value in cards
    )
    return f'<section class="cards">{body}</section>'


def _control(report: Report) -> str:
    if "control" not in report.summary:
        return ""
    text = html.escape("\n".join(control_lines(report.summary["control"])))
    return f"<h2>Accuracy control</h2><pre>{text}</pre>"


def _table(report: Report, analysis: Analysis | None) -> str:
    found = {} if analysis is None else {row["name"]: row for row in analysis.rows}
    columns: list[tuple[str, str, Mapping[str, Mapping[str, Any]]]]
    rows = {row["name"]: row for row in report.rows}
    # The analysis measures own errors on all batches, the report on the first one.
    told_better = () if analysis is None else (_OWN,)
    columns = [(title, key, rows) for title, key in _REPORT_COLUMNS if key not in told_better]
    if analysis is not None:
        more = (*_ANALYSIS_COLUMNS, *(_SCORE_COLUMNS if analysis.has_scores else ()))

        # Before the last column, the reason, whose text is as wide as it likes.
        columns[-1:-1] = [(title, key, found) for title, key in more]
    head = "".join(
        f'<th class="{"text" if key in _TEXTS else "number"}" aria-sort="none">'
        f'<button type="button">{html.escape(title)}</button></th>'
        for title, key, _ in columns
    )
    body = []
    for name, row in rows.items():
        cells = "".join(_cell(source.get(name, {}).get(key), key) for _, key, source in columns)
        body.append(f'<tr class="{row["status"]}">{cells}</tr>')
    return (
        f'<div class="wide"><table id="sites"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _legend(report: Report, analysis: Analysis | None) -> str:
    """What the kinds and the columns mean."""
    used = {row["kind"] for row in report.rows}
    entries = [(kind, text) for kind, text in kinds.MEANINGS.items() if kind in used]
    entries += [*_REPORT_LEGEND, _OWN_LEGEND]
    if analysis is not None:
        entries += _ANALYSIS_LEGEND + (_SCORE_LEGEND if analysis.has_scores else [])
    body = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in entries
    )
    return f"<details><summary>What the columns mean</summary><dl>{body}</dl></details>"


def _cell(value: Any, key: str) -> str:
    if value is None or value == "":
        return '<td data-value=""></td>'
    if isinstance(value, str):
        escaped = html.escape(value)
        return f'<td title="{escaped}" data-value="{escaped}">{escaped}</td>'
    text = str(value) if isinstance(value, int) else _number(value, key)
    # JavaScript sorts numbers; infinity is none that a page can hold.
    order = value if math.isfinite(value) else math.copysign(1e300, value)
    return f'<td class="number" data-value="{order!r}">{text}</td>'


def _number(value: float, key: str) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if key == "clipped":
        return f"{100 * value:.3g}"
    return f"{value:.1f}" if key.endswith("_db") else f"{value:.4g}"


def _pictures(analysis: Analysis, progress: Progress) -> str:
    """The pictures under their headings."""
    parts: list[str | _Picture] = [
        "<h2>Along the network</h2>",
        _Picture(plots.sqnr, (analysis,), "SQNR of every site"),
    ]
    if analysis.has_scores:
        parts += [
            "<h2>What each site costs the metric</h2>",
            _Picture(plots.sensitivity, (analysis,), "Sensitivity of the sites"),
            _Picture(plots.tradeoff, (analysis,), "Metric against int8 share"),
        ]
    shown = analysis.worst[:_DETAILED]
    parts.append(f"<h2>The {len(shown)} worst sites</h2>")
    for row in shown:
        name, tensor = where(row), row["input"]
        parts.append(f"<h3>{html.escape(name)}</h3>")
        if tensor is not None:
            parts.append(_Picture(plots.histogram, (analysis, tensor), f"histogram of {tensor}"))
        if name in analysis.weights:
            parts.append(
                _Picture(plots.weight_ranges, (analysis, name), f"weight_ranges of {name}")
            )
    # Counted before they are drawn, for the bar to know how many there are.
    total = sum(isinstance(part, _Picture) for part in parts)
    with progress.stage("drawing", total, "picture") as stage:
        return "\n".join(_drawn(part, stage) for part in parts)


class _Picture(NamedTuple):
    """One that is still to be drawn, by `draw(*given)`; `text` says what it shows."""

    draw: Callable[..., Any]
    given: tuple[Any, ...]
    text: str


def _drawn(part: str | _Picture, stage: Stage) -> str:
    if isinstance(part, str):
        return part
    image = _image(part.draw(*part.given), part.text)
    stage.step()
    return image


def _image(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    # Without metadata the same picture has the same bytes.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    # A wide picture scrolls on a narrow screen, where it could not be read if it were shrunk.
    return (
        f'<div class="figure"><img alt="{html.escape(text)}" '
        f'width="{round(figure.get_figwidth() * _CSS_DPI)}" '
        f'src="data:image/png;base64,{data}"></div>'
    )


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
