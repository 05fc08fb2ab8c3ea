"""Threshold searches: from histograms of |x| to the |x| that maps to 127.

Every search is a pure function of histograms and works on any number of them at once: `counts`
is [..., N], bin j covers [j, j + 1) * bin_width, and the result is [...].  All tensors and all
candidate thresholds are one compiled reduction in float64, so that counts up to 2**53 are exact;
the caller need not enable 64-bit types, and gets NumPy float64 back.

Everything is computed in units of the bin width, from running sums over the bins, with the counts
taken as spread evenly within each bin:

    F(e) = int_0^e h(x) dx      the count below e
    Z(e)                        the length of the non-empty part of [0, e)
    G(e) = int_0^e F(x) dx      = sum over the values x below e of (e - x)

each of which is a table look-up at a fractional position e.
"""

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

SYMMETRIC_LEVELS = 127  # symmetric int8: the threshold maps to 127
MOST_LEVELS = 255  # a tensor that is never negative: the threshold maps to 255
_CLIPPING_WEIGHT = 16.0  # see `kl_threshold`
_TIE = 1e-12  # nats; running sums in float64 resolve divergences no finer


def kl_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    variant: str = "jaxquant",
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The threshold at which int8 loses the least information (Kullback-Leibler).

    The default, "jaxquant", models the quantizer as it is.  With step s = T / L, level k covers
    [(k - 1/2) s, (k + 1/2) s), and level L everything from (L - 1/2) s on, outliers included; L is
    127 for symmetric int8.  What
    the codes tell of a value is its level; Q is the flattest density that has the same mass M_k in
    each level, over the length Z_k of the level that is not empty:

        KL(P || Q) = sum_j P_j log P_j - sum_k M_k log(M_k / Z_k)

    The first sum does not depend on T.  Exact zeros cost nothing, so what bin 0 holds in excess
    of bin 1 (the spike that a ReLU leaves) is left out.  Every T of 1, 2, 3, ... bins up to no
    clipping is a candidate.

    Divergence alone clips hard, since it does not know how far a clipped value moves (on a
    saturated ReLU6, 45 dB below no clipping).  So a candidate competes only if

        E[rounding error**2] + 16 E[clipping error**2] <= E[error**2 without clipping]

    and the least KL among those wins, the largest T in a tie.  A tensor's SQNR is hence never below
    that of abs max, as far as the histogram tells.  Clipping weighs more because clipping errors
    have one sign and occur together: in the next dot product they add up as amplitudes, rounding
    errors as powers.  With weight 1 each tensor is as good as with abs max, but the logits of
    GoogLeNet lose 4 dB; 16 gains 0.9 dB there and 0.7 dB on MobileNetV2, whose images and
    networks it was chosen on.

    The other variants reproduce their origin exactly, faults included, from the histogram alone:
    they put the outliers in the last bin kept of P but not in Q.  "paddle-3.3": 127 groups,
    candidates from N/2, never no clipping; "paddle-1.6": 255 groups, candidates from 0.7 N;
    "nvidia": 128 groups, candidates from 128 up to no clipping, bin 0 replaced by bin 1.

    Args:
      counts: [..., N] histograms of |x|, at least two bins, the first one starting at 0.
      bin_width: [...] or a scalar, in the unit of x.
      variant: a key of `KL_VARIANTS`.
      abs_max: [...] the exact largest |x|, which is then the largest threshold; without it, that is
        the upper edge of the last bin in use.  "jaxquant" only; the others ignore it.

    Returns:
      [...] thresholds, float64.  0.0 for a tensor that is all zero (nothing above bin 0).

    Raises:
      ValueError: unknown variant, counts that are negative, not finite or have fewer than two bins,
        a bin width that is not positive, or an `abs_max` that does not fit the counts.

    Example:
      >>> import numpy as np
      >>> counts = np.array([10, 20, 40, 20, 10, 0, 0, 0])
      >>> float(kl_threshold(counts, 0.5))
      2.5
      >>> float(kl_threshold(counts, 0.5, abs_max=2.25))
      2.25

    References:
      S. Migacz, 8-bit Inference with TensorRT, GTC 2017, for the textbook search.
    """
    # One search a name, so that equal calls share one compilation.
    return _search(_SEARCHES[_known(variant)], counts, bin_width, abs_max, levels)


def kl_curve(
    counts: ArrayLike,
    bin_width: ArrayLike,
    variant: str = "jaxquant",
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of `kl_threshold` and their divergences, for plots and tests.

    Args: as for `kl_threshold`.

    Returns:
      thresholds [..., C] and divergences [..., C] in nats, nan where a candidate does not compete.

    Example:
      >>> thresholds, divergences = kl_curve([10, 20, 40, 20, 10, 0, 0, 0], 0.5)
      >>> thresholds.shape
      (8,)
    """
    hist = _validated(counts, bin_width, abs_max, levels)
    candidates, divergences = _run(KL_VARIANTS[_known(variant)].curve, hist)
    shape = (*hist.shape, -1)
    return candidates.reshape(shape) * hist.bin_width[..., None], divergences.reshape(shape)


def abs_max_threshold(
    counts: ArrayLike, bin_width: ArrayLike, *, abs_max: ArrayLike | None = None
) -> np.ndarray:
    """No clipping: the largest |x|, as far as known.

    Args: as for `kl_threshold`.

    Returns:
      [...] `abs_max` where given, else the upper edge of the last bin in use; 0.0 where nothing
      lies above bin 0.

    Example:
      >>> float(abs_max_threshold([5, 2, 1, 0], 0.25))
      0.75
    """
    return _search(_abs_max_search, counts, bin_width, abs_max)


def percentile_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    percent: float = 0.99999,
    *,
    abs_max: ArrayLike | None = None,
) -> np.ndarray:
    """The |x| below which the fraction `percent` of the values lies, interpolated within its bin.

        F(T) = percent * F(infinity)

    Args:
      counts, bin_width, abs_max: as for `kl_threshold`.
      percent: in (0, 1]; 1 is no clipping.

    Returns:
      [...] thresholds, float64.

    Raises:
      ValueError: as `kl_threshold`, or `percent` outside (0, 1].

    Example:
      >>> float(percentile_threshold([4, 4, 1, 1], 1.0, 0.6))
      1.5
    """
    if not 0.0 < percent <= 1.0:
        raise ValueError(f"percent is a fraction in (0, 1], such as 0.99999; got {percent!r}")
    return _search(
        _percentile_search, counts, bin_width, abs_max, SYMMETRIC_LEVELS, np.float64(percent)
    )


def mse_threshold(
    counts: ArrayLike,
    bin_width: ArrayLike,
    *,
    abs_max: ArrayLike | None = None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
) -> np.ndarray:
    """The threshold with the least expected squared error of int8.

    With the counts spread evenly within each bin the error is exact, rounding and clipping alike.
    Quantization rounds |x| up by half a step at most and saturates at T = L s (L levels); summing
    (x - k s)**2 over the levels k by parts, with level edges e_k = (k - 1/2) s, leaves

        n mse(T) = sum (x - T)**2 - 2 s sum_{k=1}^{L} G(e_k)

    Exact zeros have no error: as in `kl_threshold`, what bin 0 holds in excess of bin 1 counts
    as such.  Candidates are T = 1, 2, 3, ... bins, up to no clipping.

    Args: as for `kl_threshold`.

    Returns:
      [...] thresholds, float64; the largest in a tie.

    Example:
      >>> float(mse_threshold([0, 0, 0, 9], 1.0))
      4.0
    """
    return _search(_mse_search, counts, bin_width, abs_max, levels)


# --- one tensor, in units of the bin width: h [N] and limit [] to a threshold [] -----------------


class _Sums(NamedTuple):
    """Running sums of one histogram, looked up at fractional positions."""

    h: jax.Array  # [N]
    below: jax.Array  # [N + 1], F at the bin edges
    support: jax.Array  # [N + 1], Z at the bin edges
    depth: jax.Array  # [N + 1], G at the bin edges


def _running(x: jax.Array) -> jax.Array:
    """[N] -> [N + 1], the sums of the first 0, 1, ..., N."""
    return jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(x)])


def _sums(h: jax.Array) -> _Sums:
    below = _running(h)
    support = _running((h > 0).astype(h.dtype))
    return _Sums(h, below, support, _running((below[:-1] + below[1:]) / 2))


def _split(edges: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Positions -> the bin that each lies in, and the fraction of that bin below it."""
    index = jnp.minimum(edges.astype(jnp.int32), bins - 1)
    return index, edges - index.astype(edges.dtype)


def _without_zeros(h: jax.Array) -> jax.Array:
    """Bin 0 less its excess over bin 1, which is taken to be exact zeros."""
    return h.at[0].set(jnp.minimum(h[0], h[1]))


def _candidates(h: jax.Array, limit: jax.Array) -> jax.Array:
    """[N] thresholds 1, 2, 3, ... bins; those beyond no clipping all become no clipping."""
    return jnp.minimum(jnp.arange(1, h.shape[0] + 1, dtype=h.dtype), limit)


def _level_edges(candidates: jax.Array, levels: jax.Array, bins: int) -> jax.Array:
    """[C] -> [C, 255], the lower edges (k - 1/2) s of the levels 1 to L; then the end."""
    k = jnp.arange(1, MOST_LEVELS + 1, dtype=candidates.dtype)
    return jnp.where(k <= levels, candidates[:, None] * ((k - 0.5) / levels), float(bins))


def _squared_errors(
    sums: _Sums, candidates: jax.Array, edges: jax.Array, levels: jax.Array
) -> jax.Array:
    """[C] summed squared quantization errors; the equation is in `mse_threshold`."""
    index, part = _split(edges, sums.h.shape[0])
    depth = sums.depth[index] + part * (sums.below[index] + part * sums.h[index] / 2)
    j = jnp.arange(sums.h.shape[0], dtype=sums.h.dtype)
    first = jnp.sum(sums.h * (j + 0.5))
    second = jnp.sum(sums.h * (j * (j + 1) + 1 / 3))
    from_threshold = second - candidates * (2 * first - candidates * sums.below[-1])
    inner = jnp.arange(1, MOST_LEVELS + 1, dtype=levels.dtype) <= levels
    return from_threshold - 2 * candidates / levels * jnp.sum(depth, axis=1, where=inner)


def _clipped_squares(h: jax.Array) -> jax.Array:
    """[N] sums of (x - T)**2 over the x above T, for T = 1, 2, 3, ... bins.

    Integrating the count above T twice, from the far end, so that nothing cancels.
    """

    def from_the_end(x: jax.Array) -> jax.Array:
        return _running(x[::-1])[::-1]

    above = from_the_end(h)
    excess = from_the_end((above[:-1] + above[1:]) / 2)  # sums of x - T
    return 2 * from_the_end(excess[1:] + above[1:] / 2 + h / 6)[1:]


def _level_information(sums: _Sums, edges: jax.Array) -> jax.Array:
    """[C] sum_k M_k log(M_k / Z_k) over the levels."""
    index, part = _split(edges, sums.h.shape[0])
    h = sums.h[index]
    mass = _between(sums.below[index] + part * h, sums.below[-1])
    support = _between(sums.support[index] + jnp.where(h > 0, part, 0.0), sums.support[-1])
    return jnp.sum(_xlog(mass, _ratio(mass, support)), axis=1)


def _between(at_edges: jax.Array, total: jax.Array) -> jax.Array:
    """Running sums at the level edges [C, K] -> the amounts in the levels [C, K + 1]."""
    return jnp.diff(
        at_edges,
        axis=1,
        prepend=jnp.zeros((at_edges.shape[0], 1), at_edges.dtype),
        append=jnp.full((at_edges.shape[0], 1), total),
    )


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and 1 where either is 0 (an empty level)."""
    full = (x > 0) & (y > 0)
    return jnp.where(full, x, 1.0) / jnp.where(full, y, 1.0)


def _xlog(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * jnp.log(y)


def _int8_curve(h: jax.Array, limit: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    candidates = _candidates(h, limit)
    edges = _level_edges(candidates, levels, h.shape[0])
    sums = _sums(_without_zeros(h))
    total = jnp.maximum(sums.below[-1], 1.0)
    known = jnp.sum(_xlog(sums.h, _ratio(sums.h, jnp.ones_like(sums.h))))
    divergence = (known - _level_information(sums, edges)) / total
    errors = _squared_errors(sums, candidates, edges, levels)
    clipped = jnp.where(candidates < limit, _clipped_squares(sums.h), 0.0)
    weighted = errors + (_CLIPPING_WEIGHT - 1) * clipped
    # The last candidate is no clipping, and always competes.
    competes = weighted <= weighted[-1] + 1e-9 * jnp.abs(weighted[-1])
    return candidates, jnp.where(competes, jnp.maximum(divergence, 0.0), jnp.nan)


def _int8_choose(h: jax.Array, candidates: jax.Array, divergence: jax.Array) -> jax.Array:
    divergence = jnp.where(jnp.isnan(divergence), jnp.inf, divergence)
    best = divergence <= jnp.min(divergence) + _TIE
    return jnp.max(jnp.where(best, candidates, 0.0))


def _textbook_divergence(h: jax.Array, edges: jax.Array) -> jax.Array:
    """Divergence of clipped histograms from their grouped versions, outliers in P alone.

    P is the first i bins with all outliers added to bin i - 1; Q spreads each group's count over
    its bins where P is not 0, so the divergence needs the groups' masses and non-empty bins only.

    Args:
      h: [N]
      edges: [C, groups + 1] bin indices; the last column is i.

    Returns:
      [C] nats; nan where Q is empty, inf where Q is 0 and P is not.
    """
    below, filled, information = (
        _running(x) for x in (h, (h > 0).astype(h.dtype), _xlog(h, _ratio(h, jnp.ones_like(h))))
    )
    end = edges[:, -1]
    last, outliers = h[end - 1], below[-1] - below[end]
    mass, bins = jnp.diff(below[edges], axis=1), jnp.diff(filled[edges], axis=1)
    log_q = jnp.log(_ratio(mass, bins))
    p_log_p = information[end - 1] + _xlog(last + outliers, jnp.maximum(last + outliers, 1e-300))
    p_log_q = jnp.sum(mass * log_q, axis=1) + outliers * log_q[:, -1]
    total = below[-1]
    divergence = (p_log_p - p_log_q) / total + jnp.log(below[end] / total)
    divergence = jnp.where((last == 0) & (outliers > 0), jnp.inf, divergence)
    return jnp.where(below[end] > 0, divergence, jnp.nan)


def _paddle_curve(
    start: float, groups: int, h: jax.Array, limit: jax.Array, levels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    bins = h.shape[0]
    i = jnp.arange(max(int((bins - 1) * start), 1), bins, dtype=jnp.int32)
    group = jnp.arange(groups, dtype=jnp.int32)
    edges = jnp.concatenate([group * (i[:, None] // groups), i[:, None]], axis=1)
    divergence = _textbook_divergence(h, edges)
    return i.astype(h.dtype) + 0.5, jnp.where(h[i - 1] > 0, divergence, jnp.nan)


def _paddle_choose(h: jax.Array, candidates: jax.Array, divergence: jax.Array) -> jax.Array:
    # With every candidate skipped it falls back on the last bin in use up to the first candidate.
    first = candidates[0]
    j = jnp.arange(h.shape[0], dtype=h.dtype)
    fallback = jnp.max(jnp.where((h > 0) & (j < first), j, 0.0)) + 0.5
    divergence = jnp.where(jnp.isnan(divergence), jnp.inf, divergence)
    best = divergence <= jnp.min(divergence) + _TIE
    smallest = jnp.min(jnp.where(best, candidates, jnp.inf))
    return jnp.where(jnp.all(jnp.isinf(divergence)), fallback, smallest)


def _nvidia_curve(h: jax.Array, limit: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    groups = SYMMETRIC_LEVELS + 1
    i = jnp.arange(min(groups, h.shape[0]), h.shape[0] + 1, dtype=jnp.int32)
    group = jnp.arange(groups + 1, dtype=jnp.int32)
    edges = (group * i[:, None] + groups - 1) // groups  # bin j is in group floor(j groups / i)
    return i.astype(h.dtype), _textbook_divergence(h.at[0].set(h[1]), edges)


def _nvidia_choose(h: jax.Array, candidates: jax.Array, divergence: jax.Array) -> jax.Array:
    # The original takes the last minimum, and its arg-min takes nan (an empty Q) for the least.
    divergence = jnp.where(jnp.isnan(divergence), -jnp.inf, divergence)
    best = divergence <= jnp.min(divergence) + _TIE
    return jnp.max(jnp.where(best, candidates, 0.0))


def _abs_max_search(h: jax.Array, limit: jax.Array, levels: jax.Array) -> jax.Array:
    return limit


def _mse_search(h: jax.Array, limit: jax.Array, levels: jax.Array) -> jax.Array:
    candidates = _candidates(h, limit)
    edges = _level_edges(candidates, levels, h.shape[0])
    errors = _squared_errors(_sums(_without_zeros(h)), candidates, edges, levels)
    best = errors <= jnp.min(errors) * (1 + 1e-12)
    return jnp.max(jnp.where(best, candidates, 0.0))


def _percentile_search(
    h: jax.Array, limit: jax.Array, levels: jax.Array, percent: jax.Array
) -> jax.Array:
    below = _running(h)
    target = percent * below[-1]
    j = jnp.argmax(below[1:] >= target)
    inside = (target - below[j]) / jnp.maximum(h[j], 1.0)
    return jnp.minimum(j.astype(h.dtype) + jnp.minimum(inside, 1.0), limit)


class KLVariant(NamedTuple):
    """One way to search, on one histogram h [N] in units of its bin width.

    Attributes:
      curve: (h, limit [], levels []) -> candidate thresholds [C] and their divergences [C];
        `limit` is the threshold without clipping.
      choose: (h, candidates, divergences) -> the threshold [].
    """

    curve: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


KL_VARIANTS: dict[str, KLVariant] = {
    "jaxquant": KLVariant(_int8_curve, _int8_choose),
    "paddle-3.3": KLVariant(functools.partial(_paddle_curve, 0.5, 127), _paddle_choose),
    "paddle-1.6": KLVariant(functools.partial(_paddle_curve, 0.7, 255), _paddle_choose),
    "nvidia": KLVariant(_nvidia_curve, _nvidia_choose),
}


def _chosen(variant: KLVariant, h: jax.Array, limit: jax.Array, levels: jax.Array) -> jax.Array:
    return variant.choose(h, *variant.curve(h, limit, levels))


_SEARCHES = {name: functools.partial(_chosen, variant) for name, variant in KL_VARIANTS.items()}


# --- all tensors --------------------------------------------------------------------------------


class _Histograms(NamedTuple):
    """Validated histograms of T tensors, in NumPy."""

    counts: np.ndarray  # [T, N] float64
    limit: np.ndarray  # [T], no clipping, in bins
    levels: np.ndarray  # [T], what the threshold maps to, as float64
    bin_width: np.ndarray  # [...]
    shape: tuple[int, ...]  # the leading axes [...], T in all


def _search(
    search: Callable[..., jax.Array],
    counts: ArrayLike,
    bin_width: ArrayLike,
    abs_max: ArrayLike | None,
    levels: ArrayLike = SYMMETRIC_LEVELS,
    *args: np.float64,
) -> np.ndarray:
    hist = _validated(counts, bin_width, abs_max, levels)
    return np.asarray(_run(search, hist, *args)).reshape(hist.shape) * hist.bin_width


def _run(search, hist: _Histograms, *args: np.float64):  # type: ignore[no-untyped-def]
    with _float64_on_host():
        return jax.tree.map(np.asarray, _map_tensors(search, *hist[:3], *args))


@functools.partial(jax.jit, static_argnums=0)
def _map_tensors(search, counts, limit, levels, *args):  # type: ignore[no-untyped-def]
    """[T, N] and [T] to whatever `search` gives, stacked; a tensor at a time to bound memory."""
    return lax.map(lambda tensor: search(*tensor, *args), (counts, limit, levels))


@contextlib.contextmanager
def _float64_on_host() -> Iterator[None]:
    """64-bit types for this computation alone, on the CPU where JAX has one at hand."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # the platforms were restricted to an accelerator
        device = None
    with jax.enable_x64(True), jax.default_device(device):
        yield


def _validated(
    counts: ArrayLike, bin_width: ArrayLike, abs_max: ArrayLike | None, levels: ArrayLike
) -> _Histograms:
    h = np.asarray(counts)
    if h.ndim < 1 or h.shape[-1] < 2 or h.dtype.kind not in "iuf":
        raise ValueError(
            f"counts are numbers [..., N] with N >= 2 bins; got shape {h.shape} and dtype {h.dtype}"
        )
    h = h.astype(np.float64)
    _refuse("counts", h, ~np.isfinite(h), "must be finite")
    _refuse("counts", h, h < 0, "must not be negative")
    width = np.asarray(bin_width, np.float64)
    _refuse("bin_width", width, ~(np.isfinite(width) & (width > 0)), "must be positive and finite")
    shape = h.shape[:-1]
    width = _broadcast("bin_width", width, shape)
    bins = np.where(h > 0, np.arange(1, h.shape[-1] + 1), 0).max(axis=-1)  # up to the last in use
    limit = np.where(bins > 1, bins, 0).astype(np.float64)
    if abs_max is not None:
        largest = np.asarray(abs_max, np.float64)
        _refuse("abs_max", largest, ~(np.isfinite(largest) & (largest >= 0)), "must be >= 0")
        largest = _broadcast("abs_max", largest, shape)
        too_small = largest < (bins - 1) * width * (1 - 1e-6)
        _refuse("abs_max", largest, too_small, "lies below the last bin in use")
        limit = np.minimum(bins, largest / width)
    steps = np.asarray(levels, np.float64)
    known = (steps >= SYMMETRIC_LEVELS) & (steps <= MOST_LEVELS) & (steps == np.rint(steps))
    _refuse("levels", steps, ~known, f"are whole, {SYMMETRIC_LEVELS} to {MOST_LEVELS}")
    steps = _broadcast("levels", steps, shape)
    h = h.reshape(-1, h.shape[-1])
    return _Histograms(h, limit.reshape(-1), steps.reshape(-1), width, shape)


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


def _known(variant: str) -> str:
    if variant in KL_VARIANTS:
        return variant
    near = difflib.get_close_matches(str(variant), KL_VARIANTS, n=2) or list(KL_VARIANTS)
    raise ValueError(
        f"unknown KL variant {variant!r}; did you mean {' or '.join(map(repr, near))}? "
        f"Valid: {', '.join(KL_VARIANTS)}"
    )
