"""What XLA's reductions do not tell: that a value is NaN.

On CPU the largest and the least of many values leave NaN out, by the shape of the tensor
(https://github.com/openxla/xla/issues/21461, jaxlib 0.10.2); sums do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def nan_if_bad(
    x: jax.Array, axis: int | Sequence[int] | None = None, *, keepdims: bool = False
) -> jax.Array:
    """0, or NaN where a value along some axes is NaN or infinite: to be added to what is reduced.

    Args:
      x: floats.
      axis, keepdims: as of `jax.numpy.sum`.

    Example:
      >>> nan_if_bad(jnp.array([[1.0, jnp.inf], [2.0, 3.0]]), axis=1).tolist()
      [nan, 0.0]
    """
    return jnp.sum(x * 0, axis=axis, keepdims=keepdims)
