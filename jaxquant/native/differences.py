"""How far one tensor is from another, channel by channel, in one pass over both."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library


class Differences(NamedTuple):
    """How far two tensors y and ŷ [..., C] are apart.

    With d = y - ŷ and w = (f(y) - f(ŷ)) / d, clipped to [0, 1], for an activation f:

    Attributes:
      sums: float32 [3, C], Σ w d, Σ w d² and Σ w, without the values where d or w is not finite.
      mean: float32 [C], as `jaxquant.recover.shift.Shift.mean` of the sums.
      powers: float32 [3], Σ y² and Σ d² over all where y is finite, the second infinite where d is
        not; and the unit, a power of two, in which y and d are measured in all sums: 1 as a rule,
        else what keeps the squares of very large or very small values within float32.
    """

    sums: jax.Array
    mean: jax.Array
    powers: jax.Array


def differences(
    y: jax.Array, y_hat: jax.Array, clamp: tuple[float, float], gain: jax.Array | None = None
) -> Differences:
    """How far two tensors with the channels along the last axis are apart.

    Args:
      y, y_hat: float32 [..., C].
      clamp: f clips to these bounds; infinite ones for no bound.
      gain: f(y) - f(ŷ), float32 [..., C], of any other f.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: the shapes differ or have no axis, or a dtype is another.
    """
    library.require()
    operands = [y, y_hat] if gain is None else [y, y_hat, gain]
    if not y.ndim or any(x.shape != y.shape or x.dtype != jnp.float32 for x in operands):
        given = ", ".join(f"{x.dtype} {x.shape}" for x in operands)
        raise ValueError(f"the tensors are {given}; expected float32 of one shape")
    # Sequential: the sums of one call are of one pair of tensors.
    comparing = jax.ffi.ffi_call(
        library.DIFFERENCES, difference_types(y.shape[-1]), vmap_method="sequential"
    )
    return Differences(*comparing(*operands, clamp=np.asarray(clamp, np.float32)))


def difference_types(channels: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of what `differences` returns for tensors of so many channels."""
    shapes = (3, channels), (channels,), (3,)
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
