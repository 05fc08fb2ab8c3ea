"""How the networks convolve while they train on a CPU.

XLA multiplies matrices fast there, but its gradients of a convolution are slow: a step of VGG16 on
32x32 images takes four times as long with them as with the products below.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Convolve = Callable[..., jax.Array]


def for_training(train: bool) -> Convolve | None:
    """`nn.Conv`'s `conv_general_dilated`; None takes XLA's convolution, as in inference always."""
    return as_one_product if train and jax.default_backend() == "cpu" else None


def as_one_product(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **settings: Any,
) -> jax.Array:
    """[B, H, W, I] and [h, w, I, O] -> [B, H', W', O]: windows as rows, times the kernel.

    The rows are h * w times the images, which is what the speed costs in memory. A convolution of
    several groups, whose products are small, is left to XLA.

    Args:
      settings: the further arguments that `nn.Conv` gives; no dilation is expected.
    """
    if feature_group_count != 1:
        return lax.conv_general_dilated(
            images,
            kernel,
            window_strides,
            padding,
            feature_group_count=feature_group_count,
            **settings,
        )
    height, width, _, features = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], kernel.shape[:2], window_strides, padding)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    down, right = window_strides
    rows = (padded.shape[1] - height) // down + 1
    columns = (padded.shape[2] - width) // right + 1
    # One strided copy of the images for each position in the window, side by side.
    shifted = [
        padded[
            :,
            top : top + down * (rows - 1) + 1 : down,
            left : left + right * (columns - 1) + 1 : right,
        ]
        for top in range(height)
        for left in range(width)
    ]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, features)
