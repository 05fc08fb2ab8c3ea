"""The arrays of any convolution with channels last, whatever their layout and number of axes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends.zero_points import ZeroPoint
from jaxquant.graph.contraction import Contraction, Window

Pads = tuple[tuple[int, int], ...]


class ChannelsLast:
    """The arrays of a convolution with channels last and at least two spatial axes.

    x is [N, *spatial, C], the kernel [*window, C / groups, O], the result [N, *spatial, O].

    Args:
      contraction: the convolution.
      is_held: whether transposed arrays are laid out so in memory, behind a barrier that keeps XLA
        from folding the transpose into the convolution.

    Attributes:
      window: of these arrays.
    """

    def __init__(self, contraction: Contraction, is_held: bool = True):
        x, kernel, result = contraction.axes
        samples, channels = result.free
        self._is_held = is_held
        self._x = (*x.free, *x.window, *x.contracted)
        self._kernel = (*kernel.window, *kernel.contracted, *kernel.free)
        self._out = (*samples, *result.window, *channels)
        # XLA's CPU convolution is fast along two axes or more: one of size 1 goes in front.
        self._added = max(0, 4 - len(self._x))
        ones = (1,) * self._added
        # What is added in front has a window of one element that does not move: the same sums.
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
        return self._expand(self._held(_transposed(x, self._x), self._x), 1)

    def kernel(self, kernel: jax.Array) -> jax.Array:
        return self._expand(self._held(_transposed(kernel, self._kernel), self._kernel), 0)

    def kernel_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * self._added + tuple(shape[a] for a in self._kernel)

    def like_result(self, value: jax.Array) -> jax.Array:
        """An array in the layout of the result, with channels last."""
        return self._expand(_transposed(value, self._out), 1)

    def back(self, result: jax.Array) -> jax.Array:
        """A result in the layout of the contraction."""
        result = self._held(result, self._out)
        result = lax.squeeze(result, range(1, 1 + self._added))
        inverse = [0] * len(self._out)
        for position, axis in enumerate(self._out):
            inverse[axis] = position
        return _transposed(result, tuple(inverse))

    def _expand(self, value: jax.Array, axis: int) -> jax.Array:
        return lax.expand_dims(value, range(axis, axis + self._added)) if self._added else value

    def _held(self, value: jax.Array, order: tuple[int, ...]) -> jax.Array:
        """A transposed array that XLA lays out so in memory, and does not fold into its user."""
        if not self._is_held or order == tuple(range(value.ndim)):
            return value
        # Flat and back: what has one axis has one layout, so that the transpose has to be done.
        return lax.optimization_barrier(value.reshape(-1)).reshape(value.shape)


def window_of(contraction: Contraction) -> Window:
    """The window of a contraction that is a convolution."""
    assert contraction.window is not None, "a dot has no window"
    return contraction.window


def undilated(
    x: jax.Array, contraction: Contraction, zero_point: ZeroPoint, is_held: bool = True
) -> tuple[jax.Array, Contraction]:
    """The input dilated and padded beforehand where it is dilated or its padding negative.

    Args:
      x: the input.
      contraction: the convolution.
      zero_point: of the input.
      is_held: whether a barrier keeps XLA from folding the padding into the convolution.
    """
    if window_of(contraction).is_undilated:
        return x, contraction
    # With the zero point: a border of zeros would stand for something else.
    x, contraction = fully_padded(x, contraction, zero_point)
    return lax.optimization_barrier(x) if is_held else x, contraction


def fully_padded(
    x: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> tuple[jax.Array, Contraction]:
    """The input padded and dilated with its zero point, and the convolution that is left."""
    window = window_of(contraction)
    config = [(0, 0, 0)] * x.ndim
    spatial = contraction.operands[0].window
    for axis, (low, high), dilation in zip(
        spatial, window.padding, window.input_dilation, strict=True
    ):
        config[axis] = (low, high, dilation - 1)
    # What is left has nothing to pad, so a kernel that pads with 0 may run it.
    left = dataclasses.replace(
        window, padding=((0, 0),) * len(spatial), input_dilation=(1,) * len(spatial)
    )
    x = lax.pad(x, jnp.asarray(zero_point, x.dtype), config)
    return x, dataclasses.replace(contraction, window=left)


def padded(x: jax.Array, padding: Pads, zero_point: ZeroPoint) -> jax.Array:
    """x [N, *spatial, C], padded with its zero point."""
    if all(pads == (0, 0) for pads in padding):
        return x
    config = [(0, 0, 0), *((*pads, 0) for pads in padding), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(zero_point, x.dtype), config)


def _transposed(value: jax.Array, order: tuple[int, ...]) -> jax.Array:
    return value if order == tuple(range(value.ndim)) else value.transpose(order)
