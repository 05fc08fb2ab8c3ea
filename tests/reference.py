"""The int8 operations in plain NumPy: int64 for what is exact, float64 for the epilogue.

Written from the definitions, one output element at a time, and without the library's code.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

# The options of `jaxquant.quant_post` under which this module tells its integers.
QUANTIZER: dict[str, Any] = {
    "algo": "abs_max",
    "activation_quantize_type": "symmetric",
    "recover": (),
    "progress": False,
}


def inv_scale(x: Any) -> np.float32:
    """What `algo="abs_max"` multiplies a tensor by before rounding; 1 for an all-zero tensor."""
    threshold = np.abs(np.asarray(x).astype(np.float64)).max(initial=0.0)
    return np.float32(127.0 / threshold) if threshold else np.float32(1.0)


def quantize(x: Any, inv_scale: Any) -> np.ndarray:
    """float32 product, rounded half to even, saturated to [-128, 127]; as int64."""
    product = np.asarray(x).astype(np.float32) * np.float32(inv_scale)
    product = np.clip(product.astype(np.float64), -129, 129)
    floor = np.floor(product)
    above = product - floor
    up = (above > 0.5) | ((above == 0.5) & (floor % 2 == 1))
    return np.clip(floor + up, -128, 127).astype(np.int64)


def fake(x: Any) -> np.ndarray:
    """`x` rounded to its own int8 grid, in float64."""
    return quantize(x, inv_scale(x)) / np.float64(inv_scale(x))


def fake_lopsided_rows(x: Any, axes: Sequence[int]) -> np.ndarray:
    """`x` on grids of its own for everything that is not along `axes`, in float64.

    Each goes from the least to the largest value, 0 within, and has a zero point.
    """
    x = np.asarray(x).astype(np.float32)
    low, high = (f(x, axis=axes, keepdims=True, initial=0) for f in (np.min, np.max))
    half = high / np.float32(2) - low / np.float32(2)
    scale = np.maximum(half * np.float32(2 / 255), np.float32(2.0**-126))
    inverse = np.float32(1) / scale
    zero_point = np.clip(-128 - np.rint(low * inverse), -128, 127)
    int8 = np.clip(np.rint(x * inverse) + zero_point, -128, 127)
    return (int8 - zero_point).astype(np.float64) * scale


def quantize_weight(weight: Any, axes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int64 weight and its float64 scales, one for each index along `axes`, in their order.

    The scales come as [C] with C the product of the sizes of `axes`; [1] where there are none.
    """
    weight = np.asarray(weight).astype(np.float64)
    rows = np.moveaxis(weight, axes, range(len(axes)))
    shape = rows.shape
    channels = int(np.prod([weight.shape[a] for a in axes]))
    int8, scales = [], []
    for row in rows.reshape(channels, *shape[len(axes) :]):
        threshold = np.abs(row).max(initial=0.0)
        scale = threshold / 127 if threshold else 1.0
        scales.append(scale)
        int8.append(np.clip(np.rint(row / scale), -127, 127).astype(np.int64))
    return np.moveaxis(np.reshape(int8, shape), range(len(axes)), axes), np.array(scales)


def fake_weight(weight: Any, axes: Sequence[int]) -> np.ndarray:
    """`weight` rounded to its int8 grids, in float64; `axes` as for `quantize_weight`."""
    int8, scales = quantize_weight(weight, axes)
    return int8 * along(scales, [int8.shape[a] for a in axes], axes, int8.ndim)


def whole_bias(bias: Any, x: Any, weight: Any, axes: Sequence[int]) -> np.ndarray:
    """`bias` in whole units of the accumulator, as float64 [C]; as it is where the weight is zero.

    Args:
      bias: [C] or one for all.
      x, weight: what the accumulator sums products of.
      axes: as for `quantize_weight`.
    """
    int8, scales = quantize_weight(weight, axes)
    unit = scales / np.float64(inv_scale(x))
    if axes:
        used = np.moveaxis(int8, axes, range(len(axes))).reshape(len(unit), -1).any(axis=1)
    else:
        used = int8.any(axis=tuple(range(int8.ndim - 1)))
    return np.where(used, np.rint(bias / unit) * unit, bias)


def along(vector: Any, sizes: Sequence[int], axes: Sequence[int], rank: int) -> np.ndarray:
    """Place a flat [C] along `axes` (of these sizes, in that order) of a tensor of `rank` axes."""
    spread = np.reshape(vector, [*sizes, *[1] * (rank - len(axes))])
    return np.moveaxis(spread, range(len(axes)), axes)


def epilogue(
    accumulator: np.ndarray,
    arrays: dict[str, Any],
    axes: Sequence[int],
) -> np.ndarray:
    """`accumulator * multiplier + bias` in float64; the channels run along `axes`."""
    sizes = [accumulator.shape[a] for a in axes]
    value = accumulator.astype(np.float64)
    value = value * along(np.float64(arrays["multiplier"]), sizes, axes, value.ndim)
    if "bias" in arrays:
        value = value + along(np.float64(arrays["bias"]), sizes, axes, value.ndim)
    return value


def conv(
    x: Any,
    kernel: Any,
    *,
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    dimension_numbers: Any,
    feature_group_count: int,
) -> np.ndarray:
    """Convolution in int64; `dimension_numbers` has lhs_spec, rhs_spec and out_spec."""
    lhs = np.asarray(x).astype(np.int64).transpose(dimension_numbers.lhs_spec)  # N C S...
    rhs = np.asarray(kernel).astype(np.int64).transpose(dimension_numbers.rhs_spec)  # O I S...
    for axis, (dilation, (low, high)) in enumerate(zip(lhs_dilation, padding), start=2):
        lhs = _pad(_dilate(lhs, axis, dilation), axis, low, high)
    for axis, dilation in enumerate(rhs_dilation, start=2):
        rhs = _dilate(rhs, axis, dilation)
    window = rhs.shape[2:]
    sizes = [max(0, (n - k) // s + 1) for n, k, s in zip(lhs.shape[2:], window, window_strides)]
    outputs, per_group = rhs.shape[:2]
    result = np.zeros((lhs.shape[0], outputs, *sizes), np.int64)
    for channel in range(outputs):
        group = channel // (outputs // feature_group_count)
        inputs = lhs[:, group * per_group : (group + 1) * per_group]
        for at in itertools.product(*map(range, sizes)):
            seen = tuple(slice(p * s, p * s + k) for p, s, k in zip(at, window_strides, window))
            product = inputs[(slice(None), slice(None), *seen)] * rhs[channel]
            result[(slice(None), channel, *at)] = product.reshape(len(lhs), -1).sum(1)
    return result.transpose(np.argsort(dimension_numbers.out_spec))


def _dilate(x: np.ndarray, axis: int, dilation: int) -> np.ndarray:
    """Put `dilation - 1` zeros between neighbours."""
    size = x.shape[axis]
    shape = list(x.shape)
    shape[axis] = (size - 1) * dilation + 1 if size else 0
    spread = np.zeros(shape, x.dtype)
    spread[(slice(None),) * axis + (slice(None, None, dilation),)] = x
    return spread


def _pad(x: np.ndarray, axis: int, low: int, high: int) -> np.ndarray:
    """Zero padding; a negative amount cuts off."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (max(low, 0), max(high, 0))
    padded = np.pad(x, widths)
    cut = slice(max(-low, 0), padded.shape[axis] - max(-high, 0))
    return padded[(slice(None),) * axis + (cut,)]


def dot_general(lhs: Any, rhs: Any, dimension_numbers: Any) -> np.ndarray:
    """Dot in int64: batch axes, then the free axes of `lhs`, then those of `rhs`."""
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = dimension_numbers
    lhs, rhs = np.asarray(lhs).astype(np.int64), np.asarray(rhs).astype(np.int64)
    lhs_free = [a for a in range(lhs.ndim) if a not in (*lhs_contract, *lhs_batch)]
    rhs_free = [a for a in range(rhs.ndim) if a not in (*rhs_contract, *rhs_batch)]
    batch = [lhs.shape[a] for a in lhs_batch]
    left = [lhs.shape[a] for a in lhs_free]
    right = [rhs.shape[a] for a in rhs_free]
    lhs = lhs.transpose([*lhs_batch, *lhs_free, *lhs_contract])
    rhs = rhs.transpose([*rhs_batch, *rhs_free, *rhs_contract])
    result = np.zeros((*batch, *left, *right), np.int64)
    for b in np.ndindex(*batch):
        for i in np.ndindex(*left):
            for j in np.ndindex(*right):
                result[(*b, *i, *j)] = (lhs[(*b, *i)] * rhs[(*b, *j)]).sum()
    return result


def ragged_dot(x: Any, weight: Any, sizes: Sequence[int], zero_point: int = 0) -> np.ndarray:
    """int64 [M, N] of x [M, K] and a weight [G, K, N]; rows behind the groups are zero."""
    x, weight = np.asarray(x).astype(np.int64) - zero_point, np.asarray(weight).astype(np.int64)
    result = np.zeros((x.shape[0], weight.shape[2]), np.int64)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            if row < x.shape[0]:
                result[row] = [sum(x[row] * column) for column in weight[group].T]
            row += 1
    return result


def window(
    x: Any,
    size: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    reduce: Any,
    fill: float,
) -> np.ndarray:
    """`reduce` over the windows of the two middle axes of [N, H, W, C], padded with `fill`."""
    padded = np.pad(np.asarray(x), [(0, 0), *padding, (0, 0)], constant_values=fill)
    counts = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:3], size, strides)]
    rows = []
    for i in range(counts[0]):
        row = []
        for j in range(counts[1]):
            top, left = i * strides[0], j * strides[1]
            row.append(reduce(padded[:, top : top + size[0], left : left + size[1]], axis=(1, 2)))
        rows.append(np.stack(row, axis=1))
    return np.stack(rows, axis=1)


def softmax(x: Any) -> np.ndarray:
    """Over the last axis, in float64."""
    e = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def linear_weights(old: int, new: int) -> np.ndarray:
    """[old, new]: what each of `new` pixels takes of each of `old`, linear and with antialiasing.

    Pixel centres are at half numbers; when shrinking, the triangle is widened to cover the pixel.
    """
    ratio = old / new
    weights = np.zeros((old, new))
    for j in range(new):
        centre = (j + 0.5) * ratio - 0.5
        for i in range(old):
            weights[i, j] = max(0.0, 1 - abs(i - centre) / max(ratio, 1.0))
        weights[:, j] /= weights[:, j].sum()
    return weights


def nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels each of `new` takes."""
    return np.floor((np.arange(new) + 0.5) * old / new).astype(int)


def interpolate(x: Any, axis: int, new: int) -> np.ndarray:
    """One axis of an int8 tensor to `new` pixels; the int8 weights have a scale for each of them.

    In the units of `x`.
    """
    x = np.asarray(x)
    weights, scales = quantize_weight(linear_weights(x.shape[axis], new), (1,))
    total = np.tensordot(x, weights, (axis, 0)) * scales
    return np.moveaxis(total, -1, axis)
