"""GoogLeNet as trained for Caffe: local response normalisation, no BatchNorm, one classifier."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import both_sides, global_average


class Branches(NamedTuple):
    """Features of the four branches of an inception block, with those of their reductions."""

    conv1x1: int
    conv3x3_reduce: int
    conv3x3: int
    conv5x5_reduce: int
    conv5x5: int
    pool_proj: int


BLOCKS = {
    "3a": Branches(64, 96, 128, 16, 32, 32),
    "3b": Branches(128, 128, 192, 32, 96, 64),
    "4a": Branches(192, 96, 208, 16, 48, 64),
    "4b": Branches(160, 112, 224, 24, 64, 64),
    "4c": Branches(128, 128, 256, 24, 64, 64),
    "4d": Branches(112, 144, 288, 32, 64, 64),
    "4e": Branches(256, 160, 320, 32, 128, 128),
    "5a": Branches(256, 160, 320, 32, 128, 128),
    "5b": Branches(384, 192, 384, 48, 128, 128),
}
POOLED_AFTER = ("3b", "4e")


class ConvReLU(nn.Module):
    """A convolution of odd kernel size with a bias, padded to keep the size at stride 1; ReLU."""

    features: int
    kernel: int = 1
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=both_sides(self.kernel // 2),
            dtype=self.dtype,
            name="conv",
        )
        return nn.relu(conv(x))


class Inception(nn.Module):
    """Four branches side by side: [B, H, W, C] -> [B, H, W, sum of their features]."""

    branches: Branches
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sizes = self.branches
        layer = functools.partial(ConvReLU, dtype=self.dtype)
        conv1x1 = layer(sizes.conv1x1, name="conv1x1")(x)
        conv3x3 = layer(sizes.conv3x3_reduce, name="conv3x3_reduce")(x)
        conv3x3 = layer(sizes.conv3x3, 3, name="conv3x3")(conv3x3)
        conv5x5 = layer(sizes.conv5x5_reduce, name="conv5x5_reduce")(x)
        conv5x5 = layer(sizes.conv5x5, 5, name="conv5x5")(conv5x5)
        pool = nn.max_pool(x, (3, 3), padding=both_sides(1))
        pool = layer(sizes.pool_proj, name="pool_proj")(pool)
        return jnp.concatenate([conv1x1, conv3x3, conv5x5, pool], axis=-1)


class GoogLeNet(nn.Module):
    """Images [B, H, W, 3], float32, BGR minus its mean -> logits [B, num_classes].

    Attributes:
      num_classes: K.
      dropout: before the classifier, in training.
      dtype: of the computation; the logits are float32.

    Reference: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015.
    """

    num_classes: int = 1000
    dropout: float = 0.4
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = functools.partial(ConvReLU, dtype=self.dtype)
        x = layer(64, 7, 2, name="conv1")(x)
        x = local_response_norm(max_pool_ceil(x))
        x = layer(64, name="conv2_reduce")(x)
        x = layer(192, 3, name="conv2")(x)
        x = max_pool_ceil(local_response_norm(x))
        for name, branches in BLOCKS.items():
            x = Inception(branches, self.dtype, name=f"inception_{name}")(x)
            if name in POOLED_AFTER:
                x = max_pool_ceil(x)
        x = global_average(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)


def max_pool_ceil(x: jax.Array) -> jax.Array:
    """Max pooling 3x3 with stride 2 whose last window may reach over the edge, as in Caffe."""
    padding = [(0, (size - 3) % 2) for size in x.shape[1:3]]
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)


def local_response_norm(x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75):
    """Divides x [..., C] by (1 + alpha / size * sum of x^2 over `size` channels around) ^ beta."""
    half = size // 2
    squares = jnp.pad(jnp.square(x), [(0, 0)] * (x.ndim - 1) + [(half, half)])
    channels = x.shape[-1]
    nearby = sum(squares[..., i : i + channels] for i in range(size))
    return x / (1.0 + alpha / size * nearby) ** beta
