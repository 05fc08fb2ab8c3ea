"""Convolution of int8 arrays with int32 accumulation: exact forms, and the rule that chooses.

XLA runs few forms of an int8 convolution fast on CPU: two spatial axes, channels last, one group,
more than a few channels, nothing dilated in the input.  Every other form is tens to hundreds of
times slower there, slower than in float32 (`experiments/benchmarks/kinds.py`).  So a convolution is
rewritten, exactly, until it is of the fast forms:

  a dilated input         is dilated beforehand, with the zero point
  another layout          is transposed to channels last and back
  one spatial axis        gets a second one, of size 1
  three and more          become a sum over the first axis of the window
  depthwise, small window is a sum of shifted products, which XLA fuses
  1x1                     is a dot

What is left is in the form of its platform (`jaxquant.backends.direct`).

XLA would undo the first two, since it folds transposes and padding into the convolution; and of
int8 padded and dilated with zeros that gives wrong sums on CPU (jax 0.10; jax 0.12 fails to compile
it).  A barrier keeps it from that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import direct
from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph import symbolic
from jaxquant.graph.contraction import Contraction, Window

# A depthwise window of at most this many taps runs as shifted multiply-adds.
_MAX_TAPS = 64

Pads = tuple[tuple[int, int], ...]


class ChannelsLast:
    """The arrays of a convolution with channels last and at least two spatial axes.

    x is [N, *spatial, C], the kernel [*window, C / groups, O], the result [N, *spatial, O].

    Attributes:
      window: of these arrays.
    """

    def __init__(self, contraction: Contraction):
        x, kernel, result = contraction.axes
        samples, channels = result.free
        self._x = (*x.free, *x.window, *x.contracted)
        self._kernel = (*kernel.window, *kernel.contracted, *kernel.free)
        self._out = (*samples, *result.window, *channels)
        self._added = max(0, 4 - len(self._x))
        ones = (1,) * self._added
        given = window_of(contraction)
        self.window = dataclasses.replace(
            given,
            strides=ones + given.strides,
            padding=((0, 0),) * self._added + given.padding,
            dilation=ones + given.dilation,
            input_dilation=ones + given.input_dilation,
        )

    @property
    def is_plain(self) -> bool:
        """True where the arrays of the contraction are of this form already."""
        return not self._added and self._x == self._out == (0, 1, 2, 3)

    def x(self, x: jax.Array) -> jax.Array:
        return self._expand(_held(_transposed(x, self._x), self._x), 1)

    def kernel(self, kernel: jax.Array) -> jax.Array:
        return self._expand(_held(_transposed(kernel, self._kernel), self._kernel), 0)

    def kernel_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * self._added + tuple(shape[a] for a in self._kernel)

    def like_result(self, value: jax.Array) -> jax.Array:
        """An array in the layout of the result, with channels last."""
        return self._expand(_transposed(value, self._out), 1)

    def back(self, result: jax.Array) -> jax.Array:
        """A result in the layout of the contraction."""
        result = _held(result, self._out)
        result = lax.squeeze(result, range(1, 1 + self._added))
        inverse = [0] * len(self._out)
        for position, axis in enumerate(self._out):
            inverse[axis] = position
        return _transposed(result, tuple(inverse))

    def _expand(self, value: jax.Array, axis: int) -> jax.Array:
        return lax.expand_dims(value, range(axis, axis + self._added)) if self._added else value


def _held(value: jax.Array, order: tuple[int, ...]) -> jax.Array:
    """A transposed array that XLA lays out so in memory, and does not fold into its user."""
    if order == tuple(range(value.ndim)):
        return value
    return lax.optimization_barrier(value.reshape(-1)).reshape(value.shape)


def _transposed(value: jax.Array, order: tuple[int, ...]) -> jax.Array:
    return value if order == tuple(range(value.ndim)) else value.transpose(order)


def window_of(contraction: Contraction) -> Window:
    """The window of a contraction that is a convolution."""
    assert contraction.window is not None, "a dot has no window"
    return contraction.window


def conv(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint = 0
) -> jax.Array:
    """Convolution of int8 arrays to int32.

    What pads the input, and lies between its elements where it is dilated, is the zero point.
    """
    x, contraction = undilated(x, contraction, zero_point)
    layout = ChannelsLast(contraction)
    x, kernel = layout.x(x), layout.kernel(kernel)
    return layout.back(_conv(x, kernel, layout.window, zero_point))


def undilated(
    x: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> tuple[jax.Array, Contraction]:
    """The input dilated and padded beforehand where it is dilated or its padding negative."""
    window = window_of(contraction)
    if window.is_undilated:
        return x, contraction
    return _fully_padded(x, contraction, window, zero_point)


def _fully_padded(
    x: jax.Array, contraction: Contraction, window: Window, zero_point: ZeroPoint
) -> tuple[jax.Array, Contraction]:
    """The input padded and dilated with its zero point, and the convolution that is left."""
    config = [(0, 0, 0)] * x.ndim
    spatial = contraction.operands[0].window
    for axis, (low, high), dilation in zip(
        spatial, window.padding, window.input_dilation, strict=True
    ):
        config[axis] = (low, high, dilation - 1)
    x = lax.optimization_barrier(lax.pad(x, jnp.int8(zero_point), config))
    left = dataclasses.replace(
        window, padding=((0, 0),) * len(spatial), input_dilation=(1,) * len(spatial)
    )
    return x, dataclasses.replace(contraction, window=left)


def _conv(x: jax.Array, kernel: jax.Array, window: Window, zero_point: ZeroPoint) -> jax.Array:
    """Channels last; any number of spatial axes."""
    if _is_small_depthwise(kernel, window) and _is_decided(x, kernel, window):
        return _depthwise_by_taps(_pad(x, window.padding, zero_point), kernel, window)
    if x.ndim > 4:
        return _by_first_axis(x, kernel, window, zero_point)
    if not is_zero(zero_point):
        x = _pad(x, window.padding, zero_point)
        window = dataclasses.replace(window, padding=((0, 0), (0, 0)))
    if _is_pointwise(kernel, window):
        return _pointwise_by_dot(x, kernel, window)
    return direct.convolve(x, kernel, window)


def _pad(x: jax.Array, padding: Pads, zero_point: ZeroPoint) -> jax.Array:
    if all(pads == (0, 0) for pads in padding):
        return x
    return lax.pad(x, jnp.int8(zero_point), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])


def _by_first_axis(
    x: jax.Array, kernel: jax.Array, window: Window, zero_point: ZeroPoint
) -> jax.Array:
    """The sum over the first axis of the window of convolutions with one spatial axis less."""
    first = (window.padding[0], *((0, 0),) * (x.ndim - 3))
    x, rest = _pad(x, first, zero_point), window.without_first()
    terms = []
    for at in range(kernel.shape[0]):
        rows = _taps_of(x, 1, at, kernel.shape[0], window.strides[0], window.dilation[0])
        flat = rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])
        term = _conv(flat, kernel[at], rest, zero_point)
        terms.append(term.reshape(*rows.shape[:2], *term.shape[1:]))
    return sum(terms[1:], start=terms[0])


def _taps_of(x: jax.Array, axis: int, at: int, size: int, stride: int, dilation: int) -> jax.Array:
    """What element `at` of a window of `size` multiplies along an axis, for every output."""
    span = max(0, x.shape[axis] - (size - 1) * dilation)  # 0: the window does not fit
    start = at * dilation if span else 0
    return lax.slice_in_dim(x, start, start + span, stride=stride, axis=axis)


def _is_small_depthwise(kernel: jax.Array, window: Window) -> bool:
    taps = math.prod(kernel.shape[:-2])
    return window.feature_groups > 1 and kernel.shape[-2] == 1 and taps <= _MAX_TAPS


def _is_decided(x: jax.Array, kernel: jax.Array, window: Window) -> bool:
    """True where it is known whether the window fits; of sizes with names it may not be."""
    reaches = [
        (size - 1) * d + 1 for size, d in zip(kernel.shape[:-2], window.dilation, strict=True)
    ]
    padded = [size + sum(p) for size, p in zip(x.shape[1:-1], window.padding, strict=True)]
    return all(
        symbolic.at_least(size, reach) is not None
        for size, reach in zip(padded, reaches, strict=True)
    )


def _depthwise_by_taps(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Depthwise convolution as a sum over the taps of the window.

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
            part = _taps_of(part, a + 1, at, kernel.shape[a], window.strides[a], window.dilation[a])
        if copies > 1:
            part = jnp.repeat(part, copies, axis=-1)
        weight = lax.index_in_dim(weights, tap, 0, keepdims=False)
        spread = lax.broadcast_in_dim(weight, part.shape, (part.ndim - 1,))
        term = lax.mul(lax.convert_element_type(part, jnp.int32), spread)
        total = term if total is None else lax.add(total, term)
    assert total is not None, "a window has an element"
    return total


def _is_pointwise(kernel: jax.Array, window: Window) -> bool:
    """True for a window of one element that stays inside the input."""
    inside = all(pads == (0, 0) for pads in window.padding)
    return window.feature_groups == 1 and inside and math.prod(kernel.shape[:-2]) == 1


def _pointwise_by_dot(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """A 1x1 convolution as a dot over the channels of the strided input."""
    x = lax.slice(x, [0] * x.ndim, x.shape, (1, *window.strides, 1))
    kernel = lax.squeeze(kernel, range(kernel.ndim - 2))
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    return lax.dot_general(x, kernel, contract, preferred_element_type=jnp.int32)
