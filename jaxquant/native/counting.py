"""Counts of a tensor's values in bins, in two passes over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.jax_shim import choices
from jaxquant.native import library

_OUTPUTS = [jax.ShapeDtypeStruct((2048,), jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.float32)]


def histogram(x: jax.Array, least_exponent: int) -> tuple[jax.Array, jax.Array]:
    """The histogram of |x| over the least power of two above it.

    Args:
      x: float32, of any shape.
      least_exponent: of the range [0, 2**e).

    Returns:
      uint32 [2048] counts, bin j covering [j, j + 1) * 2**(e - 11), and float32 [2], the least and
      the largest x (inf and -inf where there is none).  Where a value is not finite the counts are
      0 and the extremes NaN.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
    """
    library.require()
    counting = jax.ffi.ffi_call(library.HISTOGRAM, _OUTPUTS, vmap_method="sequential")
    counts, extremes = counting(x, least_exponent=np.int64(least_exponent))
    return counts, extremes


def counter(
    portable: Callable[[jax.Array], Sequence[jax.Array]], least_exponent: int
) -> Callable[[jax.Array], Sequence[jax.Array]]:
    """`histogram` on one CPU device, `portable` elsewhere; see `choices.choose_on_one_cpu`.

    In a third of the time of XLA's scatter on two cores (experiments/benchmarks/histogram.py).
    """
    if not library.runs_here():
        return portable

    def natively(x: jax.Array) -> Sequence[jax.Array]:
        return histogram(x, least_exponent)

    def count(x: jax.Array) -> Sequence[jax.Array]:
        return choices.choose_on_one_cpu(natively, portable, _OUTPUTS, [x])

    return count
