"""Weights in the layout that the kernels read: pure functions of the int8 kernel.

A packed weight is one int8 array: the int32 sums over the summed axes (what a zero point of the
activations is multiplied by), then the bytes in the order in which the kernel reads them
(`src/shape.h`).  The layout depends on the kernel's shape, the groups and whether the columns are
dilated: not on the batch, the image size or the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library

_BLOCK = 16  # output channels are filled up to a multiple of it
_LANES = 64  # channels that the depthwise kernel does at a time


def pack_conv(kernel: jax.Array, groups: int = 1, dilation: Sequence[int] = (1, 1)) -> jax.Array:
    """Pack the int8 kernel [KH, KW, C / groups, O] of a convolution; to int8 [bytes].

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: the kernel is not int8 of four axes.
    """
    library.require()
    if kernel.ndim != 4 or kernel.dtype != jnp.int8:
        raise ValueError(
            f"expected an int8 kernel [KH, KW, I, O], got {kernel.dtype}{kernel.shape}"
        )
    # Dilated columns lie apart, so that each tap is a run of its own.
    row_runs = dilation[1] == 1  # the columns of a window are contiguous
    size = jax.ShapeDtypeStruct((_packed_size(kernel.shape, groups, row_runs),), jnp.int8)
    packing = jax.ffi.ffi_call(library.PACK, size, vmap_method="sequential")
    return packing(kernel, groups=np.int64(groups), row_runs=row_runs)


def pack_dot(weight: jax.Array) -> jax.Array:
    """Pack the int8 weight [K, N] of a dot; to int8 [bytes].  Raises as `pack_conv`."""
    return pack_conv(weight[None, None])


def _packed_size(shape: tuple[int, ...], groups: int, row_runs: bool) -> int:
    height, width, inputs, outputs = shape
    # A depthwise kernel goes by channels, since there is nothing to sum over them.
    if groups > 1 and inputs == 1 and outputs == groups:
        channels, taps = _up(groups, _LANES), _up(height * width, 4)
        return 4 * channels + channels * taps
    # Runs of neighbours: a row of the window where its columns touch, else one tap.
    count, length = (height, width * inputs) if row_runs else (height * width, inputs)
    channels = groups * _up(outputs // groups, _BLOCK)
    return _up(4 * channels, 64) + channels * count * _up(length, 4)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
