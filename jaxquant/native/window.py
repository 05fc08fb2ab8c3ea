"""The geometry of a convolution's window."""

from __future__ import annotations

from collections.abc import Sequence


def output_size(
    sizes: Sequence[int],
    taps: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """How many windows fit along each axis of an input."""
    return tuple(
        # A window that is larger than its padded input fits nowhere.
        max(0, (size + sum(pads) - (count - 1) * step - 1) // stride + 1)
        for size, count, stride, pads, step in zip(
            sizes, taps, strides, padding, dilation, strict=True
        )
    )
