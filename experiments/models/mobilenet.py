"""MobileNetV1 and MobileNetV2 at width 1.0."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import ConvBN, InvertedBottleneck, both_sides, global_average

# (features, stride) of the depthwise-separable blocks of V1.
V1_BLOCKS = (
    (64, 1),
    (128, 2),
    (128, 1),
    (256, 2),
    (256, 1),
    (512, 2),
    *[(512, 1)] * 5,
    (1024, 2),
    (1024, 1),
)


class Stage(NamedTuple):
    """`repeats` bottlenecks of one width in V2; the first of them has the stride."""

    expansion: int
    features: int
    repeats: int
    stride: int


V2_STAGES = (
    Stage(expansion=1, features=16, repeats=1, stride=1),
    Stage(expansion=6, features=24, repeats=2, stride=2),
    Stage(expansion=6, features=32, repeats=3, stride=2),
    Stage(expansion=6, features=64, repeats=4, stride=2),
    Stage(expansion=6, features=96, repeats=3, stride=1),
    Stage(expansion=6, features=160, repeats=3, stride=2),
    Stage(expansion=6, features=320, repeats=1, stride=1),
)


class SeparableBlock(nn.Module):
    """Depthwise 3x3, then 1x1, each with BatchNorm and ReLU6."""

    features: int
    stride: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = functools.partial(ConvBN, activation=nn.relu6, dtype=self.dtype)
        x = layer(x.shape[-1], 3, self.stride, depthwise=True, name="depthwise")(x, train)
        return layer(self.features, name="pointwise")(x, train)


class MobileNetV1(nn.Module):
    """Images [B, H, W, 3], float32 in [-1, 1] -> logits [B, num_classes].

    Attributes:
      num_classes: K.
      dropout: before the classifier, in training.
      stem_stride: of the first convolution; 1 for images of some 32 pixels.
      dtype: of the computation; the logits are float32.

    Reference: Howard et al., "MobileNets", arXiv:1704.04861.
    """

    num_classes: int = 1000
    dropout: float = 1e-3
    stem_stride: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvBN(32, 3, self.stem_stride, activation=nn.relu6, dtype=self.dtype, name="stem")(
            x, train
        )
        for i, (features, stride) in enumerate(V1_BLOCKS, start=1):
            x = SeparableBlock(features, stride, self.dtype, name=f"block{i}")(x, train)
        x = global_average(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)


class MobileNetV2(nn.Module):
    """Images [B, H, W, 3], float32 -> logits [B, num_classes].

    Attributes:
      num_classes: K.
      dropout: before the classifier, in training.
      even_padding: pad the 3x3 kernels by one on both sides, as torchvision does, and not by
        TensorFlow's rule; they differ where the stride is 2.
      epsilon: of the BatchNorms.
      stem_stride: of the first convolution; 1 for images of some 32 pixels.
      dtype: of the computation; the logits are float32.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    num_classes: int = 1000
    dropout: float = 0.2
    even_padding: bool = False
    epsilon: float = 1e-3
    stem_stride: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        padding = both_sides(1) if self.even_padding else "SAME"
        layer = functools.partial(
            ConvBN, epsilon=self.epsilon, activation=nn.relu6, dtype=self.dtype
        )
        x = layer(32, 3, self.stem_stride, padding, name="stem")(x, train)
        blocks = [
            (stage, stage.stride if i == 0 else 1)
            for stage in V2_STAGES
            for i in range(stage.repeats)
        ]
        for i, (stage, stride) in enumerate(blocks):
            x = InvertedBottleneck(
                stage.features,
                stage.expansion,
                stride=stride,
                padding=padding,
                epsilon=self.epsilon,
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
        x = layer(1280, name="head")(x, train)
        x = global_average(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)
