"""The int8 operations by the parameters of a float equation, as JAX writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxquant.backends import int8
from jaxquant.backends.conv import conv
from jaxquant.graph import contraction


def of_conv(params: Mapping[str, Any]) -> contraction.Contraction:
    """The contraction of `conv_general_dilated`."""
    found = contraction.build("conv_general_dilated", {"batch_group_count": 1, **params}, ())
    assert found is not None
    return found


def int8_conv(
    x: jax.Array, kernel: jax.Array, params: Mapping[str, Any], zero_point: int = 0
) -> jax.Array:
    return conv(x, kernel, of_conv(params), zero_point)


def int8_dot(operands: Sequence[jax.Array], numbers: Any) -> jax.Array:
    x, w = operands
    return int8.dot((x, w), contraction.dot(numbers, (x.ndim, w.ndim)))
