"""Integers of 8 or 4 bits times the scales of their groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.code_tables import INT, look_up


def dequantize_groups(
    integers: jax.Array,
    scale: jax.Array,
    axis: int,
    length: int,
    size: int,
    weight_bits: int,
    weight_dtype: str = INT,
) -> jax.Array:
    """Integers [..., K or K/2, ...] times their scales [..., K/size, ...] along `axis`: float32.

    Args:
      integers: int8, or uint8 that holds two 4-bit integers each.
      scale: float32 or bfloat16.
      axis: where the groups are.
      length: K.
      size: the group size.
      weight_bits: 8 or 4.
      weight_dtype: what four bits are; see `jaxquant.code_tables`.
    """
    if weight_dtype != INT:
        # A code is looked up by its four bits, without the sign that unpacking gave it.
        integers = look_up(_unpack(integers, axis) & jnp.int8(15), weight_dtype)
    elif weight_bits == 4:
        integers = _unpack(integers, axis)
    # An odd K has half a byte too many, and the last group may be shorter than the others.
    value = jax.lax.slice_in_dim(integers, 0, length, axis=axis).astype(jnp.float32)
    # Floats before they are spread: exact, and few.
    spread = _repeat(scale.astype(jnp.float32), axis, size)
    return value * jax.lax.slice_in_dim(spread, 0, length, axis=axis)


def dequantize_halves(
    packed: jax.Array, scale: jax.Array, size: int, weight_dtype: str = INT
) -> tuple[jax.Array, jax.Array]:
    """The 4-bit integers at the even and at the odd places of K times their scales.

    Where K is the last axis, to make the two of a byte neighbours again takes several times as long
    as all else on CPU; apart they are products with the even and the odd places of x.

    Args:
      packed: uint8 [N, K / 2].
      scale: float32 or bfloat16 [N, groups].
      size: the group size, even where there are several.
      weight_dtype: what four bits are; see `jaxquant.code_tables`.

    Returns:
      float32 [N, K / 2], twice.
    """
    # Arithmetic shifts of signed bytes carry the sign of either half along.
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    scale = scale.astype(jnp.float32)
    if scale.shape[1] > 1:
        # Of two neighbours in a byte each half has one, so a group is half as long in each.
        scale = jax.lax.slice_in_dim(_repeat(scale, 1, size // 2), 0, packed.shape[1], axis=1)
    if weight_dtype != INT:
        halves = packed & jnp.uint8(15), packed >> jnp.uint8(4)
        low, high = (look_up(half, weight_dtype) * scale for half in halves)
        return low, high
    low, high = (signed << jnp.int8(4)) >> jnp.int8(4), signed >> jnp.int8(4)
    return low.astype(jnp.float32) * scale, high.astype(jnp.float32) * scale


def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    """Both halves of every byte, neighbours along `axis`: int8 [..., 2 K, ...].

    Shifts by a vector, and no concatenation, so that XLA fuses it with what follows.
    """
    shifts = jnp.array([4, 0], jnp.int8).reshape([2, *[1] * (packed.ndim - axis - 1)])
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    both = (jnp.expand_dims(signed, axis + 1) << shifts) >> jnp.int8(4)  # the sign comes along
    shape = list(packed.shape)
    shape[axis] *= 2
    return both.reshape(shape)


def _repeat(x: jax.Array, axis: int, times: int) -> jax.Array:
    """Each element along `axis` so many times."""
    shape = [*x.shape[: axis + 1], times, *x.shape[axis + 1 :]]
    spread = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return spread.reshape([*x.shape[:axis], x.shape[axis] * times, *x.shape[axis + 1 :]])
