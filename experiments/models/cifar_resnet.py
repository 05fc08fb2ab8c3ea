"""The small ResNets for CIFAR-10: three stages of basic blocks, shortcuts without parameters."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import ConvBN, both_sides, global_average

FEATURES = (16, 32, 64)
EPSILON = 1e-5


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut: [B, H, W, C] -> [B, H', W', features]."""

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = functools.partial(
            ConvBN,
            self.features,
            3,
            padding=both_sides(1),
            epsilon=EPSILON,
            dtype=self.dtype,
        )
        shortcut = subsample(x, self.features, self.stride)
        x = layer(stride=self.stride, activation=nn.relu, name="conv1")(x, train)
        x = layer(name="conv2")(x, train)
        return nn.relu(x + shortcut)


class CifarResNet(nn.Module):
    """Images [B, H, W, 3], float32 -> logits [B, num_classes].

    Attributes:
      depth: 6 n + 2 layers: 20, 32, 44, 56 or 110.
      num_classes: K.
      dtype: of the computation; the logits are float32.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2,
    with shortcuts of type A.
    """

    depth: int = 20
    num_classes: int = 10
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvBN(
            FEATURES[0],
            3,
            padding=both_sides(1),
            epsilon=EPSILON,
            activation=nn.relu,
            dtype=self.dtype,
            name="stem",
        )(x, train)
        for name, features, stride in blocks(self.depth):
            x = BasicBlock(features, stride, self.dtype, name=name)(x, train)
        x = global_average(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)


def blocks(depth: int) -> list[tuple[str, int, int]]:
    """Name, features and stride of each block."""
    return [
        (f"stage{i + 1}_block{j + 1}", features, 2 if i > 0 and j == 0 else 1)
        for i, features in enumerate(FEATURES)
        for j in range((depth - 2) // 6)
    ]


def subsample(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Every `stride`-th pixel, with channels of zeros before and after: the shortcut of type A."""
    missing = (features - x.shape[-1]) // 2
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing, missing)))
