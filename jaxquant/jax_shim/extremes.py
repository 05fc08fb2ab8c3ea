"""The least and the largest of many values, of which XLA leaves NaN out.

On CPU, by the shape of the tensor (https://github.com/openxla/xla/issues/21461, jaxlib 0.10.2); a
sum does not, and tells of NaN here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def least(
    x: jax.Array,
    axis: int | Sequence[int] | None = None,
    *,
    keepdims: bool = False,
    initial: float | None = None,
) -> jax.Array:
    """`jnp.min`, and NaN where one of the values is NaN or infinite.

    Args:
      x: floats.
      axis, keepdims, initial: as of `jnp.min`.
    """
    return _reduced(jnp.min, x, axis, keepdims, initial)


def largest(
    x: jax.Array,
    axis: int | Sequence[int] | None = None,
    *,
    keepdims: bool = False,
    initial: float | None = None,
) -> jax.Array:
    """`jnp.max`, and NaN where one of the values is NaN or infinite.

    Args:
      x: floats.
      axis, keepdims, initial: as of `jnp.max`.

    Example:
      >>> largest(jnp.array([[1.0, jnp.inf], [2.0, 3.0]]), axis=1).tolist()
      [nan, 3.0]
    """
    return _reduced(jnp.max, x, axis, keepdims, initial)


def _reduced(
    reduce: Callable[..., jax.Array],
    x: jax.Array,
    axis: int | Sequence[int] | None,
    keepdims: bool,
    initial: float | None,
) -> jax.Array:
    bad = jnp.sum(x * 0, axis=axis, keepdims=keepdims)  # 0 or NaN
    return reduce(x, axis=axis, keepdims=keepdims, initial=initial) + bad
