"""Running sums of one histogram, from which threshold searches read the error of a quantizer.

Everything is in units of the bin width, with the counts taken as spread evenly within each bin:

    F(e) = int_0^e h(x) dx      the count below e
    Z(e)                        the length of the non-empty part of [0, e)
    G(e) = int_0^e F(x) dx      = sum over the values x below e of (e - x)

each of which is a table look-up at a fractional position e.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SYMMETRIC_LEVELS = 127  # symmetric int8: the threshold maps to 127
MOST_LEVELS = 255  # a tensor that is never negative: the threshold maps to 255
CLIPPING_WEIGHT = 16.0  # of clipping errors beside rounding errors; see `kl_threshold`
_BLOCK = 64  # candidates that are evaluated together
_ROW = 64  # counts that are summed in one product
MARGIN = 1e-6  # far above the rounding of the sums: what it rules out cannot win


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
    """Running sums of one histogram."""

    table: jax.Array  # [N, 4], of each bin: h, and F, Z and G at its lower edge
    total: jax.Array  # [3], F, Z and G at the end

    @property
    def h(self) -> jax.Array:
        """[N]."""
        return self.table[:, 0]


class Below(NamedTuple):
    """F, Z and G of a histogram, at the same positions each."""

    counts: jax.Array
    support: jax.Array
    depth: jax.Array


def running(x: jax.Array) -> jax.Array:
    """[..., N] -> [..., N + 1], the sums of the first 0, 1, ..., N.

    By products with triangular matrices: XLA's cumulative sum takes several times as long to
    compile.  Exact where the sums are, as those of counts up to 2**53.
    """
    bins = x.shape[-1]
    rows = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -bins % _ROW)]).reshape(
        *x.shape[:-1], -1, _ROW
    )
    # Sums within rows, then those of whole rows before: two small products for one long chain.
    within = jnp.matmul(rows, jnp.triu(jnp.ones((_ROW, _ROW), x.dtype)), precision="highest")
    earlier = jnp.triu(jnp.ones((rows.shape[-2],) * 2, x.dtype), 1)
    before = jnp.matmul(within[..., -1], earlier, precision="highest")
    sums = (within + before[..., None]).reshape(*x.shape[:-1], -1)[..., :bins]
    return jnp.concatenate([jnp.zeros((*x.shape[:-1], 1), x.dtype), sums], axis=-1)


def running_sums(h: jax.Array) -> Sums:
    below, support = running(jnp.stack([h, (h > 0).astype(h.dtype)]))

    # Trapezoids: F is linear within a bin, so that its integral is exact.
    at_edges = jnp.stack([below, support, running((below[:-1] + below[1:]) / 2)], axis=1)
    table = jnp.concatenate([h[:, None], at_edges[:-1]], axis=1)
    return Sums(table, at_edges[-1])


def look_up(sums: Sums, edges: jax.Array) -> Below:
    """F, Z and G at positions, of any shape."""
    # The end of the last bin belongs to it, as the position 1 within.
    index = jnp.minimum(edges.astype(jnp.int32), sums.table.shape[0] - 1)
    part = edges - index.astype(edges.dtype)
    h, below, support, depth = jnp.moveaxis(sums.table[index], -1, 0)
    return Below(
        counts=below + part * h,
        support=support + jnp.where(h > 0, part, 0.0),
        depth=depth + part * (below + part * h / 2),
    )


def without_zeros(h: jax.Array) -> jax.Array:
    """Bin 0 less its excess over bin 1, which is taken to be exact zeros."""
    return h.at[0].set(jnp.minimum(h[0], h[1]))


def candidate_thresholds(h: jax.Array, limit: jax.Array) -> jax.Array:
    """[N] thresholds 1, 2, 3, ... bins; those beyond no clipping all become no clipping."""
    return jnp.minimum(jnp.arange(1, h.shape[0] + 1, dtype=h.dtype), limit)


def level_edges(candidates: jax.Array, levels: Levels, bins: int) -> jax.Array:
    """[C] -> [C, K], the lower edges (k - 1/2) s of the levels 1 to L; then the end."""
    # Half a step below each level, where rounding goes up to it.
    k = levels.numbers
    edges = candidates[:, None] * ((k - 0.5) / levels.steps)
    return jnp.where(k <= levels.steps, edges, float(bins))


def squared_errors(sums: Sums, candidates: jax.Array, below: Below, levels: Levels) -> jax.Array:
    """[C] summed squared quantization errors; the equation is in `mse_threshold`.

    Args:
      below: at `level_edges(candidates)`.
    """
    j = jnp.arange(sums.h.shape[0], dtype=sums.h.dtype)
    first = jnp.sum(sums.h * (j + 0.5))

    # Values are spread over a bin: their squares have a third beside those of its lower edge.
    second = jnp.sum(sums.h * (j * (j + 1) + 1 / 3))
    from_threshold = second - candidates * (2 * first - candidates * sums.total[0])
    # Levels that this tensor does not have come from the array's common size.
    inner = levels.numbers <= levels.steps
    depth = jnp.sum(below.depth, axis=1, where=inner)
    return from_threshold - 2 * candidates / levels.steps * depth


def clipped_squares(h: jax.Array) -> jax.Array:
    """[N] sums of (x - T)**2 over the x above T, for T = 1, 2, 3, ... bins.

    Integrating the count above T twice, from the far end, so that nothing cancels.
    """
    from_the_end = h[::-1]
    above = running(from_the_end)
    excess = running((above[:-1] + above[1:]) / 2)  # sums of x - T
    squares = running(excess[:-1] + above[:-1] / 2 + from_the_end / 6)
    return 2 * squares[-2::-1]


def weighted_errors(
    h: jax.Array,
    candidates: jax.Array,
    limit: jax.Array,
    levels: Levels,
    weight: float,
    beside: Callable[[Sums, Below], jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """[N] squared errors with clipping weighing `weight` times; inf where no clipping is better.

    The clipping error alone, which is cheap, rules out most candidates: one that costs more than
    no clipping altogether cannot win, and is inf without being evaluated.

    Args:
      h: [N], less the exact zeros.
      candidates: [N] of `candidate_thresholds`; the last one is no clipping.
      beside: what else to evaluate of C candidates, [C]: of the sums, and of what is below the
        level edges [C, K].

    Returns:
      The errors, and what `beside` gives where the error is at most that of no clipping, [N] each;
      it may be inf elsewhere.
    """
    sums = running_sums(h)
    clipped = jnp.where(candidates < limit, clipped_squares(h), 0.0)
    size = min(_BLOCK, candidates.shape[0])
    padding = (0, -candidates.shape[0] % size)
    blocks = [jnp.pad(x, padding, mode="edge").reshape(-1, size) for x in (candidates, clipped)]

    def is_possible(error: jax.Array, unclipped: jax.Array) -> jax.Array:
        return error <= unclipped * (1 + MARGIN) + MARGIN

    def costs(unclipped: jax.Array, candidates: jax.Array, clipped: jax.Array) -> jax.Array:
        below = look_up(sums, level_edges(candidates, levels, h.shape[0]))
        errors = squared_errors(sums, candidates, below, levels)
        if beside is None:
            # Without another measure the squares decide alone.
            return errors[None]
        wins = jnp.any(is_possible(errors + (weight - 1) * clipped, unclipped))
        other = lax.cond(wins, beside, lambda *_: jnp.full_like(errors, jnp.inf), sums, below)
        return jnp.stack([errors, other])

    def skip(unclipped: jax.Array, candidates: jax.Array, clipped: jax.Array) -> jax.Array:
        # Both branches have the same shape, as `cond` wants it.
        shape = jax.eval_shape(costs, unclipped, candidates, clipped)
        return jnp.full(shape.shape, jnp.inf, shape.dtype)

    def block(unclipped: jax.Array, inputs: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        candidates, clipped = inputs
        needed = jnp.any(is_possible(weight * clipped, unclipped))
        found = lax.cond(needed, costs, skip, unclipped, candidates, clipped)
        # The first block that is evaluated is the last one, whose last candidate clips nothing.
        return jnp.where(jnp.isinf(unclipped), found[0, -1], unclipped), found

    # From the last block on, which tells what no clipping costs.  Others in which no candidate is
    # possible are skipped; what is not needs memory for one block.
    unclipped, found = lax.scan(block, jnp.asarray(jnp.inf, h.dtype), blocks, reverse=True)
    found = jnp.moveaxis(found, 1, 0).reshape(found.shape[1], -1)
    last, found = found[:, -1:], found[:, : candidates.shape[0]]

    # The squares hold clipping once already.
    found = found.at[0].add((weight - 1) * clipped)
    found = jnp.where(is_possible(weight * clipped, unclipped), found, jnp.inf)
    return tuple(jnp.where(candidates < limit, found, last))
