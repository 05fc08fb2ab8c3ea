"""The convolution that is left when `jaxquant.backends.conv` has rewritten one, by platform.

x is int8 [N, H, W, C], the kernel int8 [KH, KW, C / groups, O], the sums int32 [N, H', W', O], the
same integers from each form up to 2^24, and the same float32 of them above:

  cpu   few input channels are padded with channels of zeros: XLA's int8 convolution is slow there
  cuda  by way of float32: XLA compiles an int8 convolution where its sums become float32 at once
        and nowhere else (cuDNN has no other); groups are bfloat16 with float32 sums, since XLA pads
        the channels of int8 convolutions without regard to groups, and gives wrong sums (jax 0.10
        and 0.11)
  tpu   as it is

Which one runs is chosen when a program is lowered; `FORMS` is the table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph.contraction import Window
from jaxquant.jax_shim import choices

Form: TypeAlias = Callable[[jax.Array, jax.Array, Window], jax.Array]

# XLA's int8 convolution of fewer input channels, or of this few to as few, is slow on CPU.
_FEW_CHANNELS = 16
_PADDED_CHANNELS = 32
# So many products of int8, each of at most 128 * 127, add up to a whole number that float32 holds.
_EXACT_TERMS = 2**24 // (128 * 127)


def convolve(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """The int32 sums, in the form of the platform for which this is compiled."""
    forms = list(dict.fromkeys(FORMS.values()))

    def pick(place: choices.Place) -> int:
        return forms.index(FORMS.get(place.platform, as_it_is))

    def of_window(form: Form) -> choices.Form:
        return lambda x, kernel: [form(x, kernel, window)]

    output = jax.eval_shape(functools.partial(as_it_is, window=window), x, kernel)
    result: jax.Array
    (result,) = choices.choose(pick, [of_window(form) for form in forms], [output], [x, kernel])
    return result


def as_it_is(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """One convolution with int32 sums."""
    return _convolution(x, kernel, window, jnp.int32)


def with_enough_channels(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Few input channels are filled up with zeros."""
    inputs, outputs = kernel.shape[-2:]
    is_few = inputs < _FEW_CHANNELS or (inputs == _FEW_CHANNELS and outputs <= _FEW_CHANNELS)
    if window.feature_groups == 1 and is_few:
        x, kernel = _with_channels(x, -1), _with_channels(kernel, -2)
    return as_it_is(x, kernel, window)


def by_way_of_float32(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Sums that are float32 first: few products in float32, many in int32 and converted at once.

    Above 2^24 they are rounded as float32, which is what all sums become behind them anyway.
    """
    if window.feature_groups > 1:
        return _groups_in_float32(x, kernel, window)
    if math.prod(kernel.shape[:-1]) <= _EXACT_TERMS:
        return _convolution(x, kernel, window, jnp.float32).astype(jnp.int32)
    # The barriers keep XLA from widening the operands before they are cut out of larger ones, and
    # from leaving out both conversions: it would not know the convolution for one of int8 then.
    x, kernel = lax.optimization_barrier((x, kernel))
    sums = as_it_is(x, kernel, window).astype(jnp.float32)
    return lax.optimization_barrier(sums).astype(jnp.int32)


def _groups_in_float32(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Float32 sums, each of so few products that it is exact, added as integers."""
    height, width, inputs, _ = kernel.shape
    most = _EXACT_TERMS // max(height * width, 1)  # input channels of one sum
    if not most:  # a window that large is exact in integers alone
        return as_it_is(x, kernel, window)
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)  # exact up to 256
    terms = []
    for start in range(0, max(inputs, 1), most):
        end = min(start + most, inputs)
        part = _channels_of_groups(x, window.feature_groups, start, end)
        term = _convolution(part, kernel[:, :, start:end], window, jnp.float32)
        terms.append(term.astype(jnp.int32))
    return sum(terms[1:], start=terms[0])


FORMS: Mapping[str, Form] = {
    "cpu": with_enough_channels,
    "cuda": by_way_of_float32,
    "rocm": by_way_of_float32,
    "tpu": as_it_is,
}


def _convolution(
    x: jax.Array, kernel: jax.Array, window: Window, sums: jax.typing.DTypeLike
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=window.feature_groups,
        preferred_element_type=sums,
    )


def _channels_of_groups(x: jax.Array, groups: int, start: int, end: int) -> jax.Array:
    """The input channels from `start` to `end` of each group."""
    if (start, end * groups) == (0, x.shape[-1]):
        return x
    lead = x.shape[:-1]
    parts = x.reshape(*lead, groups, x.shape[-1] // groups)[..., start:end]
    return parts.reshape(*lead, groups * (end - start))


def _with_channels(value: jax.Array, axis: int) -> jax.Array:
    """An operand with zeros as further input channels."""
    pads = [(0, 0, 0)] * value.ndim
    pads[axis] = (0, _PADDED_CHANNELS - value.shape[axis], 0)
    return lax.pad(value, jnp.int8(0), pads)
