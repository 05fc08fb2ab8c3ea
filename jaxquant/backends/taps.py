"""Convolutions of small windows as what XLA fuses: sums of shifted products, and dots.

x is [N, *spatial, C], padded already, the kernel [*window, C / groups, O], the result
[N, *spatial, O].
"""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import symbolic
from jaxquant.graph.contraction import Window

# A depthwise window of at most this many taps runs as shifted multiply-adds.
_MAX_TAPS = 64


def runs_by_taps(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    """True of a depthwise convolution of a small window that is known to fit into x or not to.

    Args:
      x: the input, before it is padded.
      kernel: its weight.
      window: how the kernel slides.
    """
    is_depthwise = window.feature_groups > 1 and kernel.shape[-2] == 1
    if not is_depthwise or math.prod(kernel.shape[:-2]) > _MAX_TAPS:
        return False
    reaches = [
        (size - 1) * d + 1 for size, d in zip(kernel.shape[:-2], window.dilation, strict=True)
    ]
    padded = [size + sum(p) for size, p in zip(x.shape[1:-1], window.padding, strict=True)]
    # Of sizes with names it may not be known.
    return all(
        symbolic.at_least(size, reach) is not None
        for size, reach in zip(padded, reaches, strict=True)
    )


def by_taps(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Depthwise convolution as a sum over the taps of the window; to int32.

    XLA fuses the sum into one loop over the output.
    """
    spatial = kernel.ndim - 2
    copies = kernel.shape[-1] // window.feature_groups  # outputs of a channel
    # By `lax` alone: there are many of these, and jax.numpy's operators take long to trace.
    weights = lax.convert_element_type(kernel.reshape(-1, kernel.shape[-1]), jnp.int32)
    total = None
    for tap, offset in enumerate(itertools.product(*map(range, kernel.shape[:spatial]))):
        part = x
        for a, at in enumerate(offset):
            part = taps_of(part, a + 1, at, kernel.shape[a], window.strides[a], window.dilation[a])
        # Outputs of one channel are neighbours, as the kernel has them.
        if copies > 1:
            part = jnp.repeat(part, copies, axis=-1)
        weight = lax.index_in_dim(weights, tap, 0, keepdims=False)
        spread = lax.broadcast_in_dim(weight, part.shape, (part.ndim - 1,))
        term = lax.mul(lax.convert_element_type(part, jnp.int32), spread)
        total = term if total is None else lax.add(total, term)
    assert total is not None, "a window has an element"
    return total


def taps_of(x: jax.Array, axis: int, at: int, size: int, stride: int, dilation: int) -> jax.Array:
    """What element `at` of a window of `size` multiplies along an axis, for every output."""
    span = max(0, x.shape[axis] - (size - 1) * dilation)  # 0: the window does not fit
    start = at * dilation if span else 0
    return lax.slice_in_dim(x, start, start + span, stride=stride, axis=axis)


def is_pointwise(kernel: jax.Array, window: Window) -> bool:
    """True for a window of one element that stays inside the input."""
    inside = all(pads == (0, 0) for pads in window.padding)
    return window.feature_groups == 1 and inside and math.prod(kernel.shape[:-2]) == 1


def pointwise(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """A 1x1 convolution as a dot over the channels of the strided input; to int32."""
    # A window of one element leaves out what strides skip; only channels are summed then.
    x = lax.slice(x, [0] * x.ndim, x.shape, (1, *window.strides, 1))
    kernel = lax.squeeze(kernel, range(kernel.ndim - 2))
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, kernel, contract, preferred_element_type=jnp.int32)
