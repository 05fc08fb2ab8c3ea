"""Integers of int8 that a TPU holds in float32, and products of them.

A TPU's product rounds floats to bfloat16, which holds integers up to 256, and sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph.contraction import Contraction
from jaxquant.jax_shim import choices

_MOST = 2**24  # float32 holds every integer up to it


def fits(terms: int, zero_points: Sequence[int]) -> bool:
    """Whether float32 holds the sums of so many products of int8 less these zero points."""
    return terms * math.prod(128 + abs(z) for z in zero_points) <= _MOST


def dot(
    operands: tuple[jax.Array, jax.Array],
    contraction: Contraction,
    zero_points: Sequence[ZeroPoint],
) -> jax.Array:
    """A dot of two tensors of integers less their zero points, each int8 or float32; to float32."""
    x, w = (
        value.astype(jnp.float32) if is_zero(z) else value.astype(jnp.float32) - jnp.float32(z)
        for value, z in zip(operands, zero_points, strict=True)
    )
    return lax.dot_general(x, w, contraction.dot_numbers, precision=lax.Precision.DEFAULT)


def choose(
    with_floats: choices.Form,
    with_int8: choices.Form,
    outputs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[jax.Array],
) -> list[jax.Array]:
    """What several sites give: of integers that floats hold between them where a TPU runs them."""

    def pick(place: choices.Place) -> int:
        return int(place.platform != "tpu")

    return choices.choose(pick, (with_floats, with_int8), outputs, operands)
