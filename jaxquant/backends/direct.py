"""Convolutions as one operation of XLA, in the forms that it has kernels for.

x is int8 [N, *spatial, C], the kernel int8 [*window, C / groups, O], the sums int32
[N, *spatial, O]: the same integers from each form up to 2^24, and the same float32 of them above.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph.contraction import Window

# XLA's int8 convolution of fewer input channels, or of this few to as few, is slow on CPU.
_FEW_CHANNELS = 16
_PADDED_CHANNELS = 32
# So many products of int8, each of at most 128 * 127, add up to a whole number that float32 holds.
_EXACT_TERMS = 2**24 // (128 * 127)
# cuDNN's int8 convolutions have channels in fours.
_FOUR = 4


def with_enough_channels(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Few input channels are filled up with zeros."""
    inputs, outputs = kernel.shape[-2:]
    is_few = inputs < _FEW_CHANNELS or (inputs == _FEW_CHANNELS and outputs <= _FEW_CHANNELS)
    # Groups have channels of their own, which zeros would mix.
    if window.feature_groups == 1 and is_few:
        x, kernel = (
            _filled_up(value, axis, _PADDED_CHANNELS) for value, axis in ((x, -1), (kernel, -2))
        )
    return _convolution(x, kernel, window, jnp.int32)


def by_way_of_float32(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sums that are float32 first: few products in float32, many in int32 and converted at once.

    XLA for CUDA compiles an int8 convolution where its sums become float32 at once and nowhere
    else, as cuDNN has no other.  It fills channels up to fours by itself, but without regard to
    groups, and gives wrong sums then (jax 0.10 and 0.11); so each group is filled up before.

    Above 2^24 sums are rounded as float32, which is what all of them become behind this anyway.
    """
    terms = math.prod(kernel.shape[:-1])
    groups, outputs = window.feature_groups, kernel.shape[-1] // window.feature_groups
    x, kernel = _groups_of_fours(x, kernel, groups)
    if terms <= _EXACT_TERMS:
        sums = _convolution(x, kernel, window, jnp.float32)
    else:
        # The barriers keep XLA from widening the operands before they are cut out of larger ones,
        # and from leaving out both conversions: it would not know the convolution for one of int8.
        x, kernel = lax.optimization_barrier((x, kernel))
        sums = _convolution(x, kernel, window, jnp.int32).astype(jnp.float32)
        sums = lax.optimization_barrier(sums)
    return _of_groups(sums, groups, outputs).astype(jnp.int32)


def _convolution(
    x: jax.Array, kernel: jax.Array, window: Window, sums: jax.typing.DTypeLike
) -> jax.Array:
    rank = x.ndim
    last = (0, rank - 1, *range(1, rank - 1))  # samples, channels, then the spatial axes
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(
            last, (rank - 1, rank - 2, *range(rank - 2)), last
        ),
        feature_group_count=window.feature_groups,
        preferred_element_type=sums,
    )


def _groups_of_fours(x: jax.Array, kernel: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Operands whose groups have a multiple of four input channels, and of output channels."""
    inputs, outputs = kernel.shape[-2], kernel.shape[-1] // groups
    more_inputs, more_outputs = (-(-n // _FOUR) * _FOUR for n in (inputs, outputs))
    # Channels of zeros: the sums of the others stay the same.
    if more_inputs != inputs:
        apart = _filled_up(x.reshape(*x.shape[:-1], groups, inputs), -1, more_inputs)
        x = apart.reshape(*x.shape[:-1], groups * more_inputs)
        kernel = _filled_up(kernel, -2, more_inputs)
    if more_outputs != outputs:
        apart = _filled_up(kernel.reshape(*kernel.shape[:-1], groups, outputs), -1, more_outputs)
        kernel = apart.reshape(*kernel.shape[:-1], groups * more_outputs)
    return x, kernel


def _of_groups(sums: jax.Array, groups: int, outputs: int) -> jax.Array:
    """The first output channels of each group, without those that it was filled up with."""
    if sums.shape[-1] == groups * outputs:
        return sums
    lead = sums.shape[:-1]
    apart = sums.reshape(*lead, groups, sums.shape[-1] // groups)
    return apart[..., :outputs].reshape(*lead, groups * outputs)


def _filled_up(value: jax.Array, axis: int, size: int) -> jax.Array:
    """An array with zeros behind its own elements along an axis, up to that size."""
    pads = [(0, 0, 0)] * value.ndim
    pads[axis] = (0, size - value.shape[axis], 0)
    return lax.pad(value, jnp.zeros((), value.dtype), pads)
