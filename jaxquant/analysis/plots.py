"""Pictures of an analysis: each function returns a matplotlib figure (the extra `plot`).

The figures belong to no window and no global state; save one with `figure.savefig("name.png")`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxquant.analysis.analysis import Analysis, TensorAnalysis
from jaxquant.calibration.observers import OBSERVERS
from jaxquant.errors import nearest
from jaxquant.extras import how_to_install

METHODS = ("KL", "KL:paddle-3.3", "KL:nvidia", "abs_max", "hist", "mse", "emd", "ptf", "auto")
_INT8, _FLOAT, _BAD, _GREY = "#1f6f8b", "#e08e45", "#b3261e", "#8a8f98"
_MOST_BARS = 40
_WIDEST = 40.0  # inches
_MOST_NAMES = 180  # that are legible in so many


def histogram(analysis: Analysis, tensor: str) -> Any:
    """The histogram of a tensor's |x| with every method's threshold marked.

    The counts are on a logarithmic scale.  The thresholds are those of the histogram itself; the
    one in use is drawn solid.

    Args:
      analysis: of `jaxquant.analyze`.
      tensor: a key of `analysis.tensors`; a site's is in its row, under "input".

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ValueError: there is no such tensor.
      ImportError: matplotlib is not installed.
    """
    _check_analysis(analysis)
    if tensor not in analysis.tensors:
        names = list(analysis.tensors)
        raise ValueError(f"there is no quantized tensor {tensor!r}{nearest(tensor, names)}")
    seen = analysis.tensors[tensor]
    figure, axes = _figure(8, 3.2)
    counts, edges = _coarse(seen)
    axes.stairs(counts, edges, fill=True, color=_GREY, alpha=0.5)
    axes.set_yscale("log")
    # A tensor of zeros has an axis all the same.
    axes.set_xlim(0, max(seen.stats.abs_max, seen.threshold) * 1.03 or 1)
    axes.axvline(seen.threshold, color=_BAD, label=f"in use: {seen.threshold:.4g}")
    colors = _colormap(len(METHODS))
    for method, color, value in zip(METHODS, colors, thresholds(seen).values(), strict=True):
        axes.axvline(
            value, color=color, linestyle="--", linewidth=1, label=f"{method}: {value:.4g}"
        )
    axes.set_xlabel("|x|")
    axes.set_ylabel("values")
    axes.set_title(f"{tensor}: {100 * seen.clipped:.3g} % clipped")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def thresholds(tensor: TensorAnalysis) -> dict[str, float]:
    """The threshold that each method chooses for a tensor.

    Example:
      >>> import numpy as np
      >>> from jaxquant.calibration.observations import TensorStats
      >>> counts = np.zeros(2048, np.uint64)
      >>> counts[:1024] = 5
      >>> stats = TensorStats(counts, 2**-10, -1.0, 0.99, 1.0, 5 * 1024)
      >>> tensor = TensorAnalysis(stats, 1.0, 127, np.zeros(1), np.ones(1), 0.0)
      >>> thresholds(tensor)["abs_max"]
      1.0
    """
    return {
        method: float(OBSERVERS[method].threshold([tensor.stats], [tensor.levels])[0])
        for method in METHODS
    }


def weight_ranges(analysis: Analysis, site: str) -> Any:
    """The largest magnitude of each output channel of a site's weight.

    Raises:
      ValueError: there is no such site, or it has no weight.
      ImportError: matplotlib is not installed.
    """
    _check_analysis(analysis)
    if site not in analysis.weights:
        names = list(analysis.weights)
        raise ValueError(f"there is no int8 weight of a site {site!r}{nearest(site, names)}")
    ranges = analysis.weights[site]
    figure, axes = _figure(8, 2.6)
    axes.bar(np.arange(len(ranges)), ranges, color=_INT8, width=1.0)
    # The median, since one long channel would pull a mean up with it.
    axes.axhline(float(np.median(ranges)), color=_FLOAT, linestyle="--", label="median")
    axes.set_xlabel("output channel")
    axes.set_ylabel("largest |w|")
    axes.set_title(f"{site}: weight range per channel")
    axes.legend(fontsize=8)
    return figure


def sqnr(analysis: Analysis) -> Any:
    """The SQNR of every site along the network: its own, and what has gathered up to it.

    A site inside a scan over stacked weights is there once for each layer.

    Raises:
      ImportError: matplotlib is not installed.
    """
    _check_analysis(analysis)
    rows = analysis.along
    figure, axes = _figure(min(max(6.0, 0.22 * len(rows) + 2), _WIDEST), 3.8)
    place = np.arange(len(rows))
    axes.plot(place, [row["own_db"] for row in rows], "o-", color=_INT8, label="own error alone")
    gathered = [row["accumulated_db"] for row in rows]
    values = [np.nan if value is None else value for value in gathered]
    axes.plot(place, values, "s-", color=_FLOAT, label="gathered so far", markersize=4)
    _name_sites(axes, [row["name"] for row in rows])
    axes.set_ylabel("dB of an ordinary sample")
    axes.set_title("Signal to quantization noise along the network")
    axes.legend(fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    return figure


def sensitivity(analysis: Analysis) -> Any:
    """What each site costs the metric: alone in int8, and what its float type gives back.

    The 40 most sensitive sites at most.

    Raises:
      ValueError: the analysis has no metric.
      ImportError: matplotlib is not installed.
    """
    _check_analysis(analysis)
    _need_scores(analysis)
    rows = analysis.worst[:_MOST_BARS]
    figure, axes = _figure(max(6.0, 0.25 * len(rows) + 2), 3.8)
    place = np.arange(len(rows))
    drops, gains = ([row[key] for row in rows] for key in ("alone_drop", "float_gain"))
    axes.bar(place - 0.2, drops, 0.4, color=_BAD, label="lost with this site alone in int8")
    axes.bar(place + 0.2, gains, 0.4, color=_FLOAT, label="won back with this site in float")
    _name_sites(axes, [row["name"] for row in rows])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("metric")
    axes.set_title("Sensitivity, the worst sites first")
    axes.legend(fontsize=8)
    return figure


def tradeoff(analysis: Analysis) -> Any:
    """The metric against the share of the sites in int8, the most sensitive ones left in float.

    Raises:
      ValueError: the analysis has no metric.
      ImportError: matplotlib is not installed.
    """
    _check_analysis(analysis)
    _need_scores(analysis)
    figure, axes = _figure(6, 3.4)
    shares = [100 * share for _, share, _ in analysis.summary["curve"]]
    scores = [score for _, _, score in analysis.summary["curve"]]
    axes.plot(shares, scores, "o-", color=_INT8)
    axes.axhline(analysis.summary["float_score"], color=_GREY, linestyle="--", label="float model")
    for count, share, score in analysis.summary["curve"]:
        axes.annotate(str(count), (100 * share, score), textcoords="offset points", xytext=(0, 6))
    axes.margins(y=0.15)
    axes.set_xlabel("sites in int8, % (labels: sites left in float)")
    axes.set_ylabel("metric")
    axes.set_title("Metric against int8 share")
    axes.legend(fontsize=8)
    return figure


def _coarse(tensor: TensorAnalysis) -> tuple[np.ndarray, np.ndarray]:
    """At most 256 bins up to the largest value, which a picture can show."""
    used = int(np.ceil(tensor.stats.abs_max / tensor.stats.bin_width)) or 1
    width = max(1, -(-used // 256))
    # One bin more: the largest value may lie on an edge.
    bins = -(-min(used + 1, len(tensor.stats.counts)) // width)
    counts = np.zeros(bins * width, np.float64)
    kept = min(len(counts), len(tensor.stats.counts))
    counts[:kept] = tensor.stats.counts[:kept]
    edges = np.arange(bins + 1) * width * tensor.stats.bin_width
    return counts.reshape(bins, width).sum(axis=1), edges


def _check_analysis(analysis: Any) -> None:
    if not isinstance(analysis, Analysis):
        raise TypeError(
            "analysis, the first argument, is what jaxquant.analyze returned; got "
            f"{type(analysis).__name__}"
        )


def _need_scores(analysis: Analysis) -> None:
    if not analysis.has_scores:
        raise ValueError("this picture is of a metric: call jaxquant.analyze(..., metric=...)")


def _name_sites(axes: Any, names: list[str]) -> None:
    """Name the places along an axis, of very many every second, third, ... one."""
    places = range(0, len(names), 1 + len(names) // _MOST_NAMES)
    axes.set_xticks(places, [names[place] for place in places], rotation=90, fontsize=7)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"pictures are drawn by matplotlib, which is not installed: {how_to_install('plot')}"
        ) from error
    # Not by pyplot, which keeps every figure until it is closed.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _colormap(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](n % 10) for n in range(count)]
