"""Times threshold searches over 100 tensors against Python, NumPy and ONNX Runtime.

    python -m experiments.benchmarks.thresholds

A few minutes.  Ours search all tensors in one call: the default natively where the kernels run, the
others compiled by XLA.  Two loops give the thresholds of "KL:paddle-3.3": plain Python over every
bin, as Paddle runs it, and one over the candidates alone, with NumPy for the bins.  In each round
ONNX Runtime searches the first `--sample` tensors, the NumPy loop four times as many, plain Python
two; the times are per tensor.  All run in turn within each round, on histograms of the same
activations with 2048 bins; only the searches are timed.  ONNX Runtime is left out where it is not
installed (`pip install onnxruntime onnx`).
"""

import argparse
import contextlib
import functools
import io
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.interleave import time_in_turn
from jaxquant.calibration import counting, histogram
from jaxquant.calibration.kl import kl_threshold
from jaxquant.calibration.threshold import auto_threshold, mse_threshold, percentile_threshold

BINS, GROUPS = histogram.BINS, 127
SIZE = 1 << 18


def activations(index: int) -> np.ndarray:
    """[SIZE] the values of one tensor, in turn: ReLU, ReLU6, linear, heavy tails, swish."""
    rng = np.random.default_rng(index)
    x = rng.normal(size=SIZE) * rng.uniform(0.5, 4.0)
    shaped = (
        np.maximum(x, 0),
        np.clip(2 * x, 0, 6),
        x,
        rng.laplace(size=SIZE),
        x / (1 + np.exp(-x)),
    )
    return shaped[index % len(shaped)].astype(np.float32)


def python_kl_threshold(counts: list[float], bin_width: float) -> float:
    """Paddle 3.3's threshold: P is clipped with its outliers in the last bin, Q is grouped."""
    first, total = (BINS - 1) // 2, sum(counts)
    best, threshold = math.inf, 0.0
    for i in range(first, BINS):
        if counts[i - 1] == 0:
            continue
        q, size = [0.0] * i, i // GROUPS
        for group in range(GROUPS):
            bins = range(group * size, i if group == GROUPS - 1 else (group + 1) * size)
            mass, filled = 0.0, 0
            for j in bins:
                mass += counts[j]
                filled += counts[j] > 0
            for j in bins:
                if counts[j] > 0:
                    q[j] = mass / filled
        outliers, q_total = sum(counts[i:]), sum(q)
        divergence = 0.0
        for j in range(i):
            if counts[j] > 0:
                p = (counts[j] + (outliers if j == i - 1 else 0.0)) / total
                divergence += p * math.log(p * q_total / q[j])
        if divergence < best - 1e-12:
            best, threshold = divergence, (i + 0.5) * bin_width
    return threshold


def numpy_kl_threshold(counts: np.ndarray, bin_width: float) -> float:
    """The same, with NumPy for the bins."""
    first, total = (BINS - 1) // 2, counts.sum()
    best, threshold = np.inf, 0.0
    for i in range(first, BINS):
        if counts[i - 1] == 0:
            continue
        p = counts[:i].astype(np.float64)
        filled = p > 0
        starts = np.arange(GROUPS) * (i // GROUPS)
        mass = np.add.reduceat(p, starts)
        bins = np.add.reduceat(filled.astype(np.float64), starts)
        sizes = np.diff(np.append(starts, i))
        q = np.repeat(mass / np.maximum(bins, 1), sizes)[filled]
        p[-1] += counts[i:].sum()
        p, q = p[filled] / total, q / q.sum()
        divergence = np.sum(p * np.log(p / q))
        if divergence < best - 1e-12:
            best, threshold = divergence, (i + 0.5) * bin_width
    return threshold


def onnx_runtime(method: str, values: list[np.ndarray]) -> Callable[[], Any] | None:
    """A search by ONNX Runtime's calibrator; its histograms have 2048 bins over [-max, max]."""
    try:
        from onnxruntime.quantization import calibrate
    except ImportError:
        return None
    collector = calibrate.HistogramCollector(
        method=method,
        symmetric=method == "entropy",
        num_bins=BINS,
        num_quantized_bins=128,
        percentile=99.999,
        scenario="same",
    )
    collector.collect({f"tensor{i}": [x] for i, x in enumerate(values)})

    def search() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            return collector.compute_collection_result()

    return search


def main(tensors: int, sample: int, rounds: int) -> None:
    observe = jax.jit(counting.observe)
    values = [activations(i) for i in range(tensors)]
    states = [observe(x) for x in values]
    counts, widths = zip(*map(histogram.to_numpy, states))
    counts, widths = np.stack(counts), np.array(widths)
    levels = np.array([255 if x.min() >= 0 else 127 for x in values])
    ours: dict[str, Callable[[], np.ndarray]] = {
        "KL": functools.partial(kl_threshold, counts, widths, levels=levels),
        "KL:paddle-3.3": functools.partial(kl_threshold, counts, widths, "paddle-3.3"),
        "mse": functools.partial(mse_threshold, counts, widths, levels=levels),
        "auto": functools.partial(auto_threshold, counts, widths, levels=levels),
        "percentile": functools.partial(percentile_threshold, counts, widths),
    }
    lists = [[float(count) for count in h] for h in counts[: min(2, tensors)]]
    looped = {"plain Python KL": len(lists), "NumPy KL": min(4 * sample, tensors)}
    peers: dict[str, Callable[[], Any]] = {
        "plain Python KL": lambda: [python_kl_threshold(h, w) for h, w in zip(lists, widths)],
        "NumPy KL": lambda: [
            numpy_kl_threshold(h, w) for h, w in zip(counts[: looped["NumPy KL"]], widths)
        ],
    }
    expected = kl_threshold(counts, widths, "paddle-3.3")
    for name, count in looped.items():
        if not np.allclose(peers[name](), expected[:count], rtol=1e-12):
            raise AssertionError(f"{name} and KL:paddle-3.3 choose other thresholds")
    searched = dict.fromkeys(ours, tensors) | looped
    for method in ("entropy", "percentile"):
        found = onnx_runtime(method, values[:sample])
        if found is None:
            print(f"ONNX Runtime {method}: left out, since onnxruntime is not installed")
        else:
            peers[f"ONNX Runtime {method}"] = found
            searched[f"ONNX Runtime {method}"] = min(sample, tensors)

    first = {}
    for name, search in ours.items():
        start = time.perf_counter()
        search()
        first[name] = time.perf_counter() - start
    medians = time_in_turn(ours | peers, rounds)
    print(f"{tensors} tensors of {BINS} bins, {rounds} rounds; {jax.devices()[0].platform}")
    print(f"{'':26}{'all, s':>9}{'ms/tensor':>11}{'ratio':>9}{'first call, s':>15}")
    per_tensor = {name: median / searched[name] for name, median in medians.items()}
    for name, each in per_tensor.items():
        once = f"{first[name]:15.2f}" if name in first else ""
        total = each * tensors
        ratio = each / per_tensor["KL"]
        print(f"{name:26}{total:9.3f}{each * 1e3:11.3f}{ratio:9.1f}{once}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--sample", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(arguments.tensors, arguments.sample, arguments.rounds)
