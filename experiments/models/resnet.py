"""ResNet with bottleneck blocks, for ImageNet."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import ConvBN, both_sides, global_average

STAGE_SIZES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the shortcut: [B, H, W, C] -> [B, H', W', 4 * features]."""

    features: int
    stride: int
    is_projected: bool
    stride_on_3x3: bool
    use_bias: bool
    epsilon: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = functools.partial(
            ConvBN, use_bias=self.use_bias, epsilon=self.epsilon, dtype=self.dtype
        )
        out = EXPANSION * self.features
        first, second = (1, self.stride) if self.stride_on_3x3 else (self.stride, 1)
        shortcut = layer(out, 1, self.stride, name="shortcut")(x, train) if self.is_projected else x
        x = layer(self.features, 1, first, activation=nn.relu, name="conv1")(x, train)
        x = layer(self.features, 3, second, both_sides(1), activation=nn.relu, name="conv2")(
            x, train
        )
        x = layer(out, name="conv3")(x, train)
        return nn.relu(x + shortcut)


class ResNet(nn.Module):
    """Images [B, H, W, 3], float32 -> logits [B, num_classes].

    The defaults are those of the original network and of Keras; torchvision moves the stride to the
    3x3 convolution, leaves the biases out and has another epsilon.

    Attributes:
      depth: 50, 101 or 152 layers.
      num_classes: K.
      stride_on_3x3: where a block has its stride, if not on its first 1x1 convolution.
      use_bias: whether convolutions have biases beside those of the BatchNorms.
      epsilon: of the BatchNorms.
      small_images: for images of some 32 pixels: the stem is 3x3 with stride 1, without pooling.
      dtype: of the computation; the logits are float32.

    Reference: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
    """

    depth: int = 50
    num_classes: int = 1000
    stride_on_3x3: bool = False
    use_bias: bool = True
    epsilon: float = 1e-3
    small_images: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvBN(
            64,
            *((3, 1, both_sides(1)) if self.small_images else (7, 2, both_sides(3))),
            use_bias=self.use_bias,
            epsilon=self.epsilon,
            activation=nn.relu,
            dtype=self.dtype,
            name="stem",
        )(x, train)
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=both_sides(1))
        for i, repeats in enumerate(STAGE_SIZES[self.depth]):
            for j in range(repeats):
                x = Bottleneck(
                    features=64 * 2**i,
                    stride=2 if i > 0 and j == 0 else 1,
                    is_projected=j == 0,
                    stride_on_3x3=self.stride_on_3x3,
                    use_bias=self.use_bias,
                    epsilon=self.epsilon,
                    dtype=self.dtype,
                    name=f"stage{i + 1}_block{j + 1}",
                )(x, train)
        x = global_average(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)
