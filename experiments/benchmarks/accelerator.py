"""Measures int8 on the accelerator of this machine: one process, five minutes, nothing downloaded.

    python -m experiments.benchmarks.accelerator --output=accelerator.json
    python -m experiments.benchmarks.accelerator --small    # to see that it works, on CPU

For a device that is rented by the minute.  Weights and inputs are random and made on the spot.
Each line is out as soon as it is known, and the JSON file is written anew behind each part, so that
what was measured stays where time runs out: parts that would begin behind `--minutes` are left out.

  versions   of the packages, and the device
  forms      int8 convolutions against NumPy, with the products of their compiled form
  check      `qapply.check`: the sites of a network, on the device and on the CPU
  networks   int8 (static, full, dynamic), 8-bit weights, bfloat16 and float32 (in TF32 and highest
             precision), at each batch: the median of 20 calls, its ratio to bfloat16, peak memory
  sweep      calibration beside a forward pass, in float32

A network's compiled program goes beside the JSON file with `--programs`, as `as_text()` gives it:
what autotuning chose is in it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxquant
from experiments.benchmarks import ahead_of_time
from experiments.models.transformer import Transformer
from jaxquant.backends import conv
from jaxquant.graph.contraction import build

NETWORKS = ("resnet50", "mobilenet_v1", "efficientnet_lite0", "minilm", "decoder step")
MODES = ("static", "full", "dynamic", "8-bit weights", "bfloat16", "float32", "float32 highest")
BATCHES = (32, 1, 256)  # the one that tells most first
CALLS = 20
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin")
# name -> x, kernel, strides, groups; channels last.
FORMS = {
    "3x3": ((2, 9, 9, 16), (3, 3, 16, 32), 1, 1),
    "stem": ((2, 15, 15, 3), (7, 7, 3, 64), 2, 1),
    "odd channels": ((2, 7, 7, 5), (3, 3, 5, 7), 1, 1),
    "groups": ((2, 8, 8, 12), (3, 3, 4, 6), 1, 3),
    "many groups": ((2, 8, 8, 256), (3, 3, 8, 256), 1, 32),
    "depthwise": ((2, 8, 8, 12), (3, 3, 1, 12), 1, 12),
    "depthwise, strided": ((2, 8, 8, 256), (3, 3, 1, 256), 2, 256),
    "more terms than are exact": ((1, 6, 6, 300), (3, 3, 300, 8), 1, 1),
    "three axes": ((1, 4, 5, 6, 8), (3, 3, 3, 8, 12), 1, 1),
}


class Record:
    """What was measured, printed at once and kept in a file.

    Args:
      path: of the JSON file; None for none.
      minutes: behind which no further part begins.
    """

    def __init__(self, path: pathlib.Path | None, minutes: float):
        self._path, self._end = path, time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = {}

    def add(self, part: str, name: str, value: Any) -> None:
        """Keep and print one result."""
        self.found.setdefault(part, {})[name] = value
        print(f"{part:9} {name:42} {value}", flush=True)
        if self._path:
            self._path.write_text(json.dumps(self.found, indent=1))

    def attempt(self, part: str, name: str, measure: Callable[[], Any]) -> None:
        """Measure, unless time is up; what goes wrong is a result too."""
        if time.monotonic() > self._end:
            print(f"{part:9} {name:42} left out: time is up", flush=True)
            return
        try:
            self.add(part, name, measure())
        except Exception as error:  # the rest is measured whatever a device refuses
            self.add(part, name, f"{type(error).__name__}: {str(error)[:300]}")


def tell_versions(record: Record) -> None:
    for package in (
        "jax",
        "jaxlib",
        "jaxquant",
        "libtpu",
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
    ):
        try:
            record.add("versions", package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    record.add("versions", "device", f"{device.platform} {device.device_kind}")


def form_is_exact(name: str) -> str:
    """Whether a convolution's sums equal those of NumPy on this device."""
    x_shape, kernel_shape, stride, groups = FORMS[name]
    rng, rank = np.random.default_rng(0), len(x_shape) - 2
    x, kernel = (rng.integers(-127, 128, s).astype(np.int8) for s in (x_shape, kernel_shape))
    axes = (0, rank + 1, *range(1, rank + 1))
    numbers = jax.lax.ConvDimensionNumbers(axes, (rank + 1, rank, *range(rank)), axes)
    params = {
        "window_strides": (stride,) * rank,
        "padding": ((1, 1),) * rank,
        "lhs_dilation": (1,) * rank,
        "rhs_dilation": (1,) * rank,
        "dimension_numbers": numbers,
        "feature_group_count": groups,
        "batch_group_count": 1,
    }
    contraction = build("conv_general_dilated", params, ())
    compiled = jax.jit(lambda x, k: conv.conv(x, k, contraction)).lower(x, kernel).compile()
    got = np.asarray(compiled(x, kernel))
    wrong = int(np.sum(got != _by_numpy(x, kernel, stride, groups)))
    products = ahead_of_time.described.products(compiled.as_text())
    return f"{'exact' if not wrong else f'{wrong} of {got.size} sums WRONG'}, {products}"


def _by_numpy(x: np.ndarray, kernel: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """The sums of a convolution padded by one, in int64."""
    rank = x.ndim - 2
    x = np.pad(x.astype(np.int64), ((0, 0), *((1, 1),) * rank, (0, 0)))
    spatial = tuple(range(1, rank + 1))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:rank], spatial)
    windows = windows[(slice(None), *(slice(None, None, stride),) * rank)]  # [N, *out, C, *window]
    windows = windows.reshape(*windows.shape[: rank + 1], groups, -1, *kernel.shape[:rank])
    taps = "uvw"[:rank]
    by_group = kernel.astype(np.int64).reshape(*kernel.shape[:-1], groups, -1)
    sums = np.einsum(f"...gc{taps},{taps}cgo->...go", windows, by_group)
    return sums.reshape(*sums.shape[:-2], -1)


def network(name: str, dtype: Any, small: bool) -> tuple[Callable[..., Any], Any, np.ndarray]:
    """(apply_fn, params, a sample of its inputs)."""
    if name != "decoder step":
        return ahead_of_time.network(name, dtype)
    sizes = {"width": 64, "hidden": 128} if small else {"width": 1024, "hidden": 4096}
    model = Transformer(
        1000, layers=4, heads=8, length=256, scanned=False, decode=True, dtype=dtype, **sizes
    )
    ids = np.ones((1, 1), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), ids)
    return lambda p, ids: _step(model, p, ids), variables["params"], ids


def _step(model: Transformer, params: Any, ids: jax.Array) -> jax.Array:
    """The logits of one token behind an empty cache."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["cache"]
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    logits, _ = model.apply({"params": params, "cache": cache}, ids, mutable="cache")
    return logits


def form_of(name: str, mode: str, small: bool) -> tuple[Callable[..., Any], Any, np.ndarray]:
    """(a function of arrays and inputs, its arrays, a sample) of a network in a mode."""
    dtype = jnp.bfloat16 if mode == "bfloat16" else jnp.float32
    apply_fn, params, sample = network(name, dtype, small)
    if mode == "bfloat16":
        return apply_fn, jax.tree.map(lambda x: x.astype(dtype), params), sample
    if mode.startswith("float32"):
        return apply_fn, params, sample
    qparams, qapply = ahead_of_time.quantized(mode, params, apply_fn, sample)
    return qapply, qparams, sample


def inputs_of(name: str, sample: np.ndarray, batch: int, small: bool) -> jax.Array:
    """A batch like the sample, of images in the network's own size."""
    is_image = name in ahead_of_time.IMAGES and not small
    shape = (batch, *(ahead_of_time.IMAGE if is_image else sample.shape[1:]))
    return jnp.asarray(np.resize(sample, shape))


def milliseconds(
    name: str, mode: str, batches: Sequence[int], small: bool, programs: pathlib.Path | None
) -> dict[str, Any]:
    """The median time of a call by batch, and the most memory that was used."""
    function, arrays, sample = form_of(name, mode, small)
    precision = "highest" if mode == "float32 highest" else None
    found: dict[str, Any] = {}
    for batch in batches:
        x = inputs_of(name, sample, batch, small)
        with jax.default_matmul_precision(precision):
            compiled = jax.jit(function).lower(arrays, x).compile()
        if programs:
            (programs / f"{name}-{mode}-{batch}.txt".replace(" ", "_")).write_text(
                compiled.as_text()
            )
        jax.block_until_ready(compiled(arrays, x))
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            jax.block_until_ready(compiled(arrays, x))
            times.append(1000 * (time.perf_counter() - start))
        found[str(batch)] = round(statistics.median(times), 4)
    used = jax.devices()[0].memory_stats() or {}
    return {**found, "peak_bytes": used.get("peak_bytes_in_use")}


def tell_ratios(record: Record) -> None:
    """The time of each mode over bfloat16's."""
    found = record.found.get("networks", {})
    for key, times in found.items():
        name, _, mode = key.partition(": ")
        base = found.get(f"{name}: bfloat16")
        if isinstance(times, dict) and isinstance(base, dict) and mode != "bfloat16":
            ratios = {b: round(times[b] / base[b], 3) for b in times if b.isdigit() and b in base}
            record.add("ratios", key, ratios)


def sweep(batch: int, small: bool) -> dict[str, float]:
    """Seconds of calibration on 8 batches beside those of as many forward passes."""
    apply_fn, params, sample = network("resnet50", jnp.float32, small)
    batches = [inputs_of("resnet50", sample, batch, small)] * 8
    forward = jax.jit(apply_fn)
    found = {}
    for name, run in (
        ("forward", lambda: [jax.block_until_ready(forward(params, x)) for x in batches]),
        ("calibrate", lambda: jaxquant.calibrate(params, apply_fn, batches, progress=False)),
    ):
        for when in ("first", "again"):
            start = time.perf_counter()
            run()
            found[f"{name}, {when}"] = round(time.perf_counter() - start, 3)
    return found


def check(name: str, small: bool) -> str:
    """`qapply.check` of a network."""
    apply_fn, params, sample = network(name, jnp.float32, small)
    qparams, qapply = ahead_of_time.quantized("full", params, apply_fn, sample)
    return str(qapply.check(qparams, sample, device=jax.devices()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="the JSON file")
    parser.add_argument("--programs", type=pathlib.Path, help="a folder for compiled programs")
    parser.add_argument("--minutes", type=float, default=4.5, help="behind which nothing begins")
    parser.add_argument("--small", action="store_true", help="tiny inputs, and one batch")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    given = parser.parse_args()
    if given.programs:
        given.programs.mkdir(parents=True, exist_ok=True)
    record, small = Record(given.output, given.minutes), given.small
    batches = (2,) if small else BATCHES

    # What tells of wrong results comes first, then what is compared most.
    tell_versions(record)
    for name in FORMS:
        record.attempt("forms", name, lambda name=name: form_is_exact(name))
    for name in given.networks:
        record.attempt("check", name, lambda name=name: check(name, small))
        for mode in given.modes:
            record.attempt(
                "networks",
                f"{name}: {mode}",
                lambda name=name, mode=mode: milliseconds(
                    name, mode, batches, small, given.programs
                ),
            )
    tell_ratios(record)
    record.attempt("sweep", "resnet50", lambda: sweep(batches[0], small))


if __name__ == "__main__":
    main()
