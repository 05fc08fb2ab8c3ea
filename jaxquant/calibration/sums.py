"""Running sums of one histogram, from which threshold searches read the error of a quantizer.

Everything is in units of the bin width, with the counts taken as spread evenly within each bin:

    F(e) = int_0^e h(x) dx      the count below e
    Z(e)                        the length of the non-empty part of [0, e)
    G(e) = int_0^e F(x) dx      = sum over the values x below e of (e - x)

each of which is a table look-up at a fractional position e.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SYMMETRIC_LEVELS = 127  # symmetric int8: the threshold maps to 127
MOST_LEVELS = 255  # a tensor that is never negative: the threshold maps to 255
CLIPPING_WEIGHT = 16.0  # of clipping errors beside rounding errors; see `kl_threshold`
_BLOCK = 64  # candidates that are evaluated together
_MARGIN = 1e-6  # far above the rounding of the sums: what it rules out cannot win


class Levels(NamedTuple):
    """How many levels the threshold maps to, and how many a search is compiled for.

    Attributes:
      steps: [] float64, how many, at most `most`.
      most: 127 or 255, the K of the arrays [C, K] of level edges.
    """

    steps: jax.Array
    most: int

    @property
    def numbers(self) -> jax.Array:
        """[K], 1, 2, 3, ..."""
        return jnp.arange(1, self.most + 1, dtype=self.steps.dtype)


class Sums(NamedTuple):
    """Running sums of one histogram, looked up at fractional positions."""

    h: jax.Array  # [N]
    below: jax.Array  # [N + 1], F at the bin edges
    support: jax.Array  # [N + 1], Z at the bin edges
    depth: jax.Array  # [N + 1], G at the bin edges


def running(x: jax.Array) -> jax.Array:
    """[N] -> [N + 1], the sums of the first 0, 1, ..., N."""
    return jnp.concatenate([jnp.zeros(1, x.dtype), jnp.cumsum(x)])


def running_sums(h: jax.Array) -> Sums:
    below = running(h)
    support = running((h > 0).astype(h.dtype))
    return Sums(h, below, support, running((below[:-1] + below[1:]) / 2))


def locate(edges: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Positions -> the bin that each lies in, and the fraction of that bin below it."""
    index = jnp.minimum(edges.astype(jnp.int32), bins - 1)
    return index, edges - index.astype(edges.dtype)


def without_zeros(h: jax.Array) -> jax.Array:
    """Bin 0 less its excess over bin 1, which is taken to be exact zeros."""
    return h.at[0].set(jnp.minimum(h[0], h[1]))


def candidate_thresholds(h: jax.Array, limit: jax.Array) -> jax.Array:
    """[N] thresholds 1, 2, 3, ... bins; those beyond no clipping all become no clipping."""
    return jnp.minimum(jnp.arange(1, h.shape[0] + 1, dtype=h.dtype), limit)


def level_edges(candidates: jax.Array, levels: Levels, bins: int) -> jax.Array:
    """[C] -> [C, K], the lower edges (k - 1/2) s of the levels 1 to L; then the end."""
    k = levels.numbers
    edges = candidates[:, None] * ((k - 0.5) / levels.steps)
    return jnp.where(k <= levels.steps, edges, float(bins))


def squared_errors(
    sums: Sums, candidates: jax.Array, edges: jax.Array, levels: Levels
) -> jax.Array:
    """[C] summed squared quantization errors; the equation is in `mse_threshold`."""
    index, part = locate(edges, sums.h.shape[0])
    depth = sums.depth[index] + part * (sums.below[index] + part * sums.h[index] / 2)
    j = jnp.arange(sums.h.shape[0], dtype=sums.h.dtype)
    first = jnp.sum(sums.h * (j + 0.5))
    second = jnp.sum(sums.h * (j * (j + 1) + 1 / 3))
    from_threshold = second - candidates * (2 * first - candidates * sums.below[-1])
    inner = levels.numbers <= levels.steps
    return from_threshold - 2 * candidates / levels.steps * jnp.sum(depth, axis=1, where=inner)


def clipped_squares(h: jax.Array) -> jax.Array:
    """[N] sums of (x - T)**2 over the x above T, for T = 1, 2, 3, ... bins.

    Integrating the count above T twice, from the far end, so that nothing cancels.
    """

    def from_the_end(x: jax.Array) -> jax.Array:
        return running(x[::-1])[::-1]

    above = from_the_end(h)
    excess = from_the_end((above[:-1] + above[1:]) / 2)  # sums of x - T
    return 2 * from_the_end(excess[1:] + above[1:] / 2 + h / 6)[1:]


def weighted_errors(
    h: jax.Array, candidates: jax.Array, limit: jax.Array, levels: Levels, weight: float
) -> jax.Array:
    """[N] squared errors with clipping weighing `weight` times; inf where no clipping is better.

    The clipping error alone, which is cheap, rules out most candidates: one that costs more than
    no clipping altogether cannot win, and is inf without being evaluated.

    Args:
      h: [N], less the exact zeros.
      candidates: [N] of `candidate_thresholds`; the last one is no clipping.
    """
    sums = running_sums(h)
    clipped = jnp.where(candidates < limit, clipped_squares(h), 0.0)

    def errors(candidates: jax.Array) -> jax.Array:
        edges = level_edges(candidates, levels, h.shape[0])
        return squared_errors(sums, candidates, edges, levels)

    unclipped = errors(candidates[-1:])[0]
    possible = weight * clipped <= unclipped * (1 + _MARGIN) + _MARGIN
    possible &= candidates < limit
    evaluated = evaluate(errors, candidates, possible) + (weight - 1) * clipped
    return jnp.where(candidates < limit, evaluated, unclipped)


def evaluate(
    function: Callable[[jax.Array], jax.Array], candidates: jax.Array, needed: jax.Array
) -> jax.Array:
    """`function(candidates)` [N] where `needed` [N], inf elsewhere.

    Blocks in which no candidate is needed are skipped; the others need memory for one block.
    """
    size = min(_BLOCK, candidates.shape[0])
    padding = (0, -candidates.shape[0] % size)
    blocks = jnp.pad(candidates, padding, mode="edge").reshape(-1, size)
    masks = jnp.pad(needed, padding).reshape(-1, size)

    def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        values, mask = inputs
        return lax.cond(jnp.any(mask), function, lambda x: jnp.full_like(x, jnp.inf), values)

    found = lax.map(block, (blocks, masks)).reshape(-1)[: candidates.shape[0]]
    return jnp.where(needed, found, jnp.inf)
