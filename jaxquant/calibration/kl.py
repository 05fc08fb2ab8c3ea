"""The threshold at which int8 loses the least information (Kullback-Leibler divergence)."""

import difflib
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxquant.backends import operations
from jaxquant.calibration.search import in_chunks, search, validated
from jaxquant.calibration.sums import (
    CLIPPING_WEIGHT,
    MARGIN,
    SYMMETRIC_LEVELS,
    Below,
    Levels,
    Sums,
    candidate_thresholds,
    running,
    weighted_errors,
    without_zeros,
)

_TIE = 1e-12  # nats; running sums in float64 resolve divergences no finer
_SLACK = 1e-9  # relative, of squared errors
_WEIGHING = operations.Weighing(CLIPPING_WEIGHT, MARGIN, _SLACK, _TIE)


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
    searching = _SEARCHES[_known(variant)]
    # The kernel has the default search alone; the others reproduce what was, and need not be fast.
    kernel = operations.kl_search(_WEIGHING) if variant == "jaxquant" else None
    if kernel is None:
        return search(searching, counts, bin_width, abs_max, levels)
    hist = validated(counts, bin_width, abs_max, levels)
    found = in_chunks(kernel, hist)
    return found.reshape(hist.shape) * hist.bin_width


def _level_information(sums: Sums, below: Below) -> jax.Array:
    """[C] sum_k M_k log(M_k / Z_k) over the levels, of what is below their edges [C, K]."""
    mass = _between(below.counts, sums.total[0])
    support = _between(below.support, sums.total[1])
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


def _int8_curve(h: jax.Array, limit: jax.Array, levels: Levels) -> tuple[jax.Array, jax.Array]:
    candidates = candidate_thresholds(h, limit)

    def divergence(sums: Sums, below: Below) -> jax.Array:
        # Bins that hold nothing add nothing, so P log P is summed once for all candidates.
        known = jnp.sum(_xlog(sums.h, _ratio(sums.h, jnp.ones_like(sums.h))))
        total = jnp.maximum(sums.total[0], 1.0)
        return jnp.maximum((known - _level_information(sums, below)) / total, 0.0)

    weighted, found = weighted_errors(
        without_zeros(h), candidates, limit, levels, CLIPPING_WEIGHT, divergence
    )
    # The last candidate is no clipping, and always competes.
    competes = weighted <= weighted[-1] + _SLACK * jnp.abs(weighted[-1])
    return candidates, jnp.where(competes, found, jnp.nan)


def _int8_choose(h: jax.Array, candidates: jax.Array, divergence: jax.Array) -> jax.Array:
    # NaN is no candidate: infinitely far.
    divergence = jnp.where(jnp.isnan(divergence), jnp.inf, divergence)
    best = divergence <= jnp.min(divergence) + _TIE
    # The largest of equals clips least.
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
    filled, information = (h > 0).astype(h.dtype), _xlog(h, _ratio(h, jnp.ones_like(h)))
    below, filled, information = running(jnp.stack([h, filled, information]))
    end = edges[:, -1]
    # P has what is clipped in its last bin, Q has not, as those searches do.
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
    start: float, groups: int, h: jax.Array, limit: jax.Array, levels: Levels
) -> tuple[jax.Array, jax.Array]:
    bins = h.shape[0]
    i = jnp.arange(max(int((bins - 1) * start), 1), bins, dtype=jnp.int32)
    group = jnp.arange(groups, dtype=jnp.int32)
    edges = jnp.concatenate([group * (i[:, None] // groups), i[:, None]], axis=1)
    divergence = _textbook_divergence(h, edges)
    # Paddle skips candidates whose last bin is empty, and takes the middle of the bin behind for
    # the threshold.
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


def _nvidia_curve(h: jax.Array, limit: jax.Array, levels: Levels) -> tuple[jax.Array, jax.Array]:
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


class KLVariant(NamedTuple):
    """One way to search, on one histogram h [N] in units of its bin width.

    Attributes:
      curve: (h, limit [], levels) -> candidate thresholds [C] and their divergences [C];
        `limit` is the threshold without clipping.
      choose: (h, candidates, divergences) -> the threshold [].
    """

    curve: Callable[[jax.Array, jax.Array, Levels], tuple[jax.Array, jax.Array]]
    choose: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


KL_VARIANTS: dict[str, KLVariant] = {
    "jaxquant": KLVariant(_int8_curve, _int8_choose),
    "paddle-3.3": KLVariant(functools.partial(_paddle_curve, 0.5, 127), _paddle_choose),
    "paddle-1.6": KLVariant(functools.partial(_paddle_curve, 0.7, 255), _paddle_choose),
    "nvidia": KLVariant(_nvidia_curve, _nvidia_choose),
}


def _chosen(variant: KLVariant, h: jax.Array, limit: jax.Array, levels: Levels) -> jax.Array:
    return variant.choose(h, *variant.curve(h, limit, levels))


# One search a name, so that equal calls share one compilation.
_SEARCHES = {name: functools.partial(_chosen, variant) for name, variant in KL_VARIANTS.items()}


def _known(variant: str) -> str:
    if variant in KL_VARIANTS:
        return variant
    near = difflib.get_close_matches(str(variant), KL_VARIANTS, n=2) or list(KL_VARIANTS)
    raise ValueError(
        f"unknown KL variant {variant!r}; did you mean {' or '.join(map(repr, near))}? "
        f"Valid: {', '.join(KL_VARIANTS)}"
    )
