"""The float32 tensor that an int8 convolution adds, as a TPU is to read it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.jax_shim import choices

# From so many bytes on: less than that stays in the memory beside a TPU's core, in any order.
_LEAST_BYTES = 2**25


def given_before(added: jax.Array) -> jax.Array:
    """A residual that is there, on a TPU, before the convolution that adds it.

    Where another convolution gives it, a shortcut, XLA would add behind that one: the sums of this
    one go to memory as int32, and come back.  In the other order the shortcut's convolution has
    nothing to read but int8 (by XLA's estimate for TPU v5e, the two of ResNet50's first block,
    batch 32: 663 -> 513 thousand cycles).
    """
    if not _is_large(added):
        return added

    # Past a barrier XLA cannot move the addition to where the residual is made.
    def barred(added: jax.Array) -> list[jax.Array]:
        return [lax.optimization_barrier(added)]

    def pick(place: choices.Place) -> int:
        return int(place.platform != "tpu")

    output = jax.ShapeDtypeStruct(added.shape, added.dtype)
    (result,) = choices.choose(pick, (barred, lambda added: [added]), [output], [added])
    return jnp.asarray(result)


def _is_large(value: jax.Array) -> bool:
    """True where the size is known, and is beyond `_LEAST_BYTES`."""
    sizes = [size for size in value.shape if isinstance(size, int)]
    return len(sizes) == value.ndim and math.prod(sizes) * value.dtype.itemsize >= _LEAST_BYTES
