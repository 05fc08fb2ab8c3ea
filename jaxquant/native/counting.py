"""Counts of a tensor's values in bins, in two passes over it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library


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
    # One histogram is of one tensor: mapped ones are counted one after the other.
    counting = jax.ffi.ffi_call(library.HISTOGRAM, histogram_types(), vmap_method="sequential")
    counts, extremes = counting(x, least_exponent=np.int64(least_exponent))
    return counts, extremes


def histogram_types() -> list[jax.ShapeDtypeStruct]:
    """Shape and dtype of what `histogram` gives."""
    return [jax.ShapeDtypeStruct((2048,), jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.float32)]
