"""The layers that the networks share."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.convolution import for_training

Activation = Callable[[jax.Array], jax.Array]
Padding = str | Sequence[tuple[int, int]]


def both_sides(padding: int) -> Padding:
    """The same zero padding before and after both spatial axes."""
    return ((padding, padding), (padding, padding))


class ConvBN(nn.Module):
    """Convolution, BatchNorm, activation: [B, H, W, C] -> [B, H', W', features].

    Attributes:
      features: output channels.
      kernel: spatial size of the (square) kernel.
      stride: in both spatial directions.
      padding: "SAME" (TensorFlow's rule, which may pad unevenly), "VALID" or pairs of integers.
      depthwise: one filter per input channel; `features` must equal the input channels.
      use_bias: whether the convolution has a bias beside that of the BatchNorm.
      epsilon: added to the BatchNorm's variance.
      activation: applied last; None leaves the result linear.
      dtype: of the computation and the result; parameters and statistics are float32.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    padding: Padding = "SAME"
    depthwise: bool = False
    use_bias: bool = False
    epsilon: float = 1e-3
    activation: Activation | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            strides=(self.stride, self.stride),
            padding=self.padding,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=self.use_bias,
            dtype=self.dtype,
            conv_general_dilated=for_training(train),
            name="conv",
        )(x)
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=self.epsilon,
            dtype=jnp.float32,
            name="bn",
        )(x.astype(jnp.float32)).astype(self.dtype)
        return x if self.activation is None else self.activation(x)


class InvertedBottleneck(nn.Module):
    """1x1 to `expansion` times the channels, depthwise, 1x1: [B, H, W, C] -> [B, H', W', features].

    The sum with the input follows where the shapes allow it. ReLU6 but for the last.

    Reference: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    features: int
    expansion: int
    kernel: int = 3
    stride: int = 1
    padding: Padding = "SAME"
    epsilon: float = 1e-3
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        inputs = x
        layer = functools.partial(ConvBN, epsilon=self.epsilon, dtype=self.dtype)
        wide = x.shape[-1] * self.expansion
        if self.expansion != 1:
            x = layer(wide, activation=nn.relu6, name="expand")(x, train)
        x = layer(
            wide,
            self.kernel,
            self.stride,
            self.padding,
            depthwise=True,
            activation=nn.relu6,
            name="depthwise",
        )(x, train)
        x = layer(self.features, name="project")(x, train)
        has_skip = self.stride == 1 and inputs.shape[-1] == self.features
        return x + inputs if has_skip else x


def global_average(x: jax.Array) -> jax.Array:
    """The mean over the image: [B, H, W, C] -> [B, C]."""
    return jnp.mean(x, axis=(1, 2))
