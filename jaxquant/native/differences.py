"""How far one tensor is from another, channel by channel, in one pass over both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library


def differences(
    y: jax.Array, y_hat: jax.Array, clamp: tuple[float, float], gain: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sums over two tensors with the channels along the last axis.

    With d = y - ŷ and w = (f(y) - f(ŷ)) / d, clipped to [0, 1], for an activation f:

    Args:
      y, y_hat: float32 [..., C].
      clamp: f clips to these bounds; infinite ones for no bound.
      gain: f(y) - f(ŷ), float32 [..., C], of any other f.

    Returns:
      float32 [3, C], Σ w d, Σ w d² and Σ w, without the values where d or w is not finite; and
      float32 [2], Σ y² and Σ d² over all where y is finite, the second infinite where d is not.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: the shapes differ or have no axis, or a dtype is another.
    """
    library.require()
    operands = [y, y_hat] if gain is None else [y, y_hat, gain]
    if not y.ndim or any(x.shape != y.shape or x.dtype != jnp.float32 for x in operands):
        given = ", ".join(f"{x.dtype} {x.shape}" for x in operands)
        raise ValueError(f"the tensors are {given}; expected float32 of one shape")
    outputs = output_types(y.shape[-1])
    comparing = jax.ffi.ffi_call(library.DIFFERENCES, outputs, vmap_method="sequential")
    sums, powers = comparing(*operands, clamp=np.asarray(clamp, np.float32))
    return sums, powers


def output_types(channels: int) -> list[jax.ShapeDtypeStruct]:
    """Of `differences`."""
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, channels), (2,))]
