"""Weights in the layout that the kernels read: pure functions of the int8 kernel.

A packed weight is one int8 array: the int32 sums over the summed axes (what a zero point of the
activations is multiplied by), then the bytes in the order in which the kernel reads them.  The
layout depends on the kernel's shape, the groups and whether the columns are dilated: not on the
batch, the image size or the machine.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK, _HALF = 32, 16  # output channels that a tile of the matrix kernel has
_LANES = 64  # channels that the depthwise kernel does at a time


def pack_conv(kernel: jax.Array, groups: int = 1, dilation: tuple[int, int] = (1, 1)) -> jax.Array:
    """Pack the int8 kernel [KH, KW, C / groups, O] of a convolution; to int8 [bytes]."""
    height, width, inputs, outputs = kernel.shape
    if is_depthwise(kernel.shape, groups):
        return _pack_depthwise(kernel)
    if dilation[1] == 1:  # the columns of a window are contiguous
        rows = kernel.reshape(height, width * inputs, outputs)
    else:
        rows = kernel.reshape(height * width, inputs, outputs)
    return _pack_matrix(rows, groups)


def pack_dot(weight: jax.Array) -> jax.Array:
    """Pack the int8 weight [K, N] of a dot; to int8 [bytes]."""
    return _pack_matrix(weight[None], 1)


def is_depthwise(kernel_shape: tuple[int, ...], groups: int) -> bool:
    """True for a convolution of each channel by itself, to one channel each."""
    return groups > 1 and kernel_shape[2] == 1 and kernel_shape[3] == groups


def _pack_matrix(runs: jax.Array, groups: int) -> jax.Array:
    """`runs` [R, K, groups * O]: every run of K is filled up to a multiple of four."""
    count, length, outputs = runs.shape
    sums = jnp.sum(runs, axis=(0, 1), dtype=jnp.int32).reshape(groups, outputs // groups)
    out = outputs // groups
    more_out, more_length = -out % _HALF, -length % 4
    values = runs.reshape(count, length, groups, out)
    values = jnp.pad(values, ((0, 0), (0, more_length), (0, 0), (0, more_out)))
    fours = count * (length + more_length) // 4
    values = values.reshape(fours, 4, groups, out + more_out).transpose(2, 0, 3, 1)
    whole = (out + more_out) // _BLOCK * _BLOCK
    blocks = values[:, :, :whole].reshape(groups, fours, whole // _BLOCK, _BLOCK, 4)
    blocks = blocks.transpose(0, 2, 1, 3, 4).reshape(groups, -1)
    rest = values[:, :, whole:].reshape(groups, -1)
    data = jnp.concatenate([blocks, rest], axis=1).reshape(-1)
    header = _bytes(jnp.pad(sums, ((0, 0), (0, more_out))).reshape(-1))
    return jnp.concatenate([jnp.pad(header, (0, -header.size % 64)), data])


def _pack_depthwise(kernel: jax.Array) -> jax.Array:
    height, width, _, channels = kernel.shape
    taps = kernel.reshape(height * width, channels)
    if _LANES % channels == 0:
        taps = jnp.tile(taps, (1, _LANES // channels))
    taps = jnp.pad(taps, ((0, -taps.shape[0] % 4), (0, -taps.shape[1] % _LANES)))
    header = _bytes(jnp.sum(taps, axis=0, dtype=jnp.int32))
    # [quads, tap, block, lane, vector, channel] -> [block, quads, vector, lane, channel, tap]
    values = taps.reshape(taps.shape[0] // 4, 4, taps.shape[1] // _LANES, 4, 4, 4)
    return jnp.concatenate([header, values.transpose(2, 0, 4, 3, 5, 1).reshape(-1)])


def _bytes(values: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(values, jnp.int8).reshape(-1)
