"""Run a threshold search over the histograms of all tensors at once.

Searches work on `counts` [..., N], where bin j covers [j, j + 1) * bin_width, and give [...].  They
are compiled reductions over all candidate thresholds in float64, so that counts up to 2**53 are
exact; the caller need not enable 64-bit types, and gets NumPy float64 back.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jaxquant.calibration.sums import MOST_LEVELS, SYMMETRIC_LEVELS, Levels
from jaxquant.jax_shim import compilation

_CHUNK = 8  # tensors a call


class Histograms(NamedTuple):
    """Validated histograms of T tensors, in NumPy."""

    counts: np.ndarray  # [T, N] float64
    limit: np.ndarray  # [T], no clipping, in bins
    levels: np.ndarray  # [T], what the threshold maps to, as float64
    bin_width: np.ndarray  # [...]
    shape: tuple[int, ...]  # the leading axes [...], T in all


def search(
    function: Callable[..., jax.Array],
    counts: ArrayLike,
    bin_width: ArrayLike,
    abs_max: ArrayLike | None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
    *args: np.float64,
) -> np.ndarray:
    """`function(h [N], limit [], levels, *args)` of every tensor, times its bin width.

    `limit` is the threshold without clipping in bins; the other arguments are those of
    `jaxquant.kl_threshold`.
    """
    hist = validated(counts, bin_width, abs_max, levels)
    return np.asarray(run_search(function, hist, *args)).reshape(hist.shape) * hist.bin_width


def run_search(function, hist: Histograms, *args: np.float64):  # type: ignore[no-untyped-def]
    """What `function` gives for every tensor, stacked and in NumPy.

    The tensors go in chunks of one size, so that a search is compiled once for all networks (once
    more if some have more levels than symmetric int8), each chunk in a thread: XLA on CPU runs such
    small operations on one core.
    """
    most = MOST_LEVELS if np.any(hist.levels > SYMMETRIC_LEVELS) else SYMMETRIC_LEVELS

    def run(*members: np.ndarray):  # type: ignore[no-untyped-def]
        count = len(members[1])
        # A chunk that is not full has histograms of zeros beside, so that all have one shape.
        part = [np.zeros((_CHUNK, *x.shape[1:])) for x in members[:2]]
        part.append(np.full(_CHUNK, float(SYMMETRIC_LEVELS)))
        for padded, values in zip(part, members, strict=True):
            padded[:count] = values
        with _float64_on_host():  # of this thread
            found = jax.device_get(_compiled()(function, most, *part, *args))
        return jax.tree.map(lambda x: x[:count], found)

    return in_chunks(run, hist)


def in_chunks(run, hist: Histograms):  # type: ignore[no-untyped-def]
    """What `run(counts, limit, levels)` gives for a few tensors at a time, each in a thread."""
    starts = range(0, max(len(hist.limit), 1), _CHUNK)
    chunks = [[x[start : start + _CHUNK] for x in hist[:3]] for start in starts]
    # No more threads than cores: each search takes one of them whole.
    with futures.ThreadPoolExecutor(min(len(starts), _cores())) as pool:
        results = list(pool.map(lambda chunk: run(*chunk), chunks))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@functools.cache
def _compiled() -> Callable[..., Any]:
    options = compilation.quick_compilation()
    return jax.jit(_map_tensors, static_argnums=(0, 1), compiler_options=options)


def _map_tensors(function, most, counts, limit, levels, *args):  # type: ignore[no-untyped-def]
    """[T, N] and [T] to whatever `function` gives, stacked; a tensor at a time to bound memory."""

    def one(tensor):  # type: ignore[no-untyped-def]
        own, limit, steps = tensor
        return function(own, limit, Levels(steps, most), *args)

    return lax.map(one, (counts, limit, levels))


@contextlib.contextmanager
def _float64_on_host() -> Iterator[None]:
    """64-bit types for this computation alone, on the CPU where JAX has one at hand."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the platforms were restricted to an accelerator
        device = None
    with jax.enable_x64(True), jax.default_device(device):
        yield


def validated(
    counts: ArrayLike, bin_width: ArrayLike, abs_max: ArrayLike | None, levels: ArrayLike
) -> Histograms:
    given = np.asarray(counts)
    if given.ndim < 1 or given.shape[-1] < 2 or given.dtype.kind not in "iuf":
        raise ValueError(
            "counts are numbers [..., N] with N >= 2 bins; got shape "
            f"{given.shape} and dtype {given.dtype}"
        )
    # float64 holds counts up to 2**53 exactly.
    given = given.astype(np.float64)
    _refuse("counts", given, ~np.isfinite(given), "must be finite")
    _refuse("counts", given, given < 0, "must not be negative")
    width = np.asarray(bin_width, np.float64)
    _refuse("bin_width", width, ~(np.isfinite(width) & (width > 0)), "must be positive and finite")
    shape = given.shape[:-1]
    width = _broadcast("bin_width", width, shape)
    # Bins above the last one in use hold no candidate: the search is as long as the data.
    bins = np.where(given > 0, np.arange(1, given.shape[-1] + 1), 0).max(axis=-1)
    limit = np.where(bins > 1, bins, 0).astype(np.float64)
    if abs_max is not None:
        largest = np.asarray(abs_max, np.float64)
        _refuse("abs_max", largest, ~(np.isfinite(largest) & (largest >= 0)), "must be >= 0")
        largest = _broadcast("abs_max", largest, shape)
        # A hair of tolerance: abs_max is float32, and the edge is computed.
        too_small = largest < (bins - 1) * width * (1 - 1e-6)
        _refuse("abs_max", largest, too_small, "lies below the last bin in use")
        limit = np.minimum(bins, largest / width)
    steps = np.asarray(levels, np.float64)
    known = (steps >= SYMMETRIC_LEVELS) & (steps <= MOST_LEVELS) & (steps == np.rint(steps))
    _refuse("levels", steps, ~known, f"are whole, {SYMMETRIC_LEVELS} to {MOST_LEVELS}")
    steps = _broadcast("levels", steps, shape)
    given = given.reshape(-1, given.shape[-1])
    return Histograms(given, limit.reshape(-1), steps.reshape(-1), width, shape)


def _refuse(name: str, values: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if np.any(bad):
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        at = f" at index {where}" if where else ""
        raise ValueError(f"{name} {rule}; got {values[where]!s}{at}")


def _broadcast(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(
            f"{name} must have the leading shape of counts, {shape}, or be a scalar; "
            f"got shape {values.shape}"
        ) from None
