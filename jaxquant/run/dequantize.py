"""Floats from weights that are stored as integers with a scale for each group of them."""

from __future__ import annotations

from typing import NamedTuple

import jax

from jaxquant.backends.dequantize import dequantize_groups
from jaxquant.code_tables import INT
from jaxquant.plan.groups import GroupLayout


class StoredWeight(NamedTuple):
    """What `jaxquant.weights.groups.quantize_groups` returned, the scales as floats, and took."""

    integers: jax.Array
    scale: jax.Array
    layout: GroupLayout
    weight_bits: int
    weight_dtype: str = INT


def dequantize_weight(weight: StoredWeight) -> jax.Array:
    """The weight as float32, in its own shape."""
    integers, scale, layout, weight_bits, weight_dtype = weight
    # Four bits are packed in the order of their groups already; eight lie as the weight does.
    if weight_bits == 8:
        integers = integers.transpose(layout.order).reshape(layout.shape)
    length = layout.shape[layout.axis]
    value = dequantize_groups(
        integers, scale, layout.axis, length, layout.size, weight_bits, weight_dtype
    )
    # Back from the order of the groups to the weight's own axes.
    return value.reshape(layout.permuted).transpose(layout.inverse)
