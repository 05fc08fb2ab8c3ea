"""EfficientNet-Lite0 to Lite4: EfficientNet without squeeze-and-excite, with ReLU6.

Reference: Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019; the Lite variants were published with TensorFlow in 2020. As there, the stem, the head
and the repeats of the first and the last stage do not scale.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import ConvBN, InvertedBottleneck, global_average


class Stage(NamedTuple):
    """`repeats` blocks of one width; the first of them has the stride."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    features: int


class Variant(NamedTuple):
    """How a variant scales the stages, and the image size that it was trained for."""

    width: float
    depth: float
    image_size: int


STAGES = (
    Stage(repeats=1, kernel=3, stride=1, expansion=1, features=16),
    Stage(repeats=2, kernel=3, stride=2, expansion=6, features=24),
    Stage(repeats=2, kernel=5, stride=2, expansion=6, features=40),
    Stage(repeats=3, kernel=3, stride=2, expansion=6, features=80),
    Stage(repeats=3, kernel=5, stride=1, expansion=6, features=112),
    Stage(repeats=4, kernel=5, stride=2, expansion=6, features=192),
    Stage(repeats=1, kernel=3, stride=1, expansion=6, features=320),
)

VARIANTS = {
    "lite0": Variant(width=1.0, depth=1.0, image_size=224),
    "lite1": Variant(width=1.0, depth=1.1, image_size=240),
    "lite2": Variant(width=1.1, depth=1.2, image_size=260),
    "lite3": Variant(width=1.2, depth=1.4, image_size=280),
    "lite4": Variant(width=1.4, depth=1.8, image_size=300),
}

STEM_FEATURES = 32
HEAD_FEATURES = 1280


class EfficientNetLite(nn.Module):
    """Images [B, H, W, 3], float32, normalised by (x - 127) / 128 -> logits [B, num_classes].

    Attributes:
      variant: a key of `VARIANTS`.
      num_classes: K.
      dropout: before the classifier, in training.
      stem_stride: of the first convolution; 1 for images of some 32 pixels.
      dtype: of the computation; the logits are float32.
    """

    variant: str = "lite0"
    num_classes: int = 1000
    dropout: float = 0.2
    stem_stride: int = 2
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layer = functools.partial(ConvBN, activation=nn.relu6, dtype=self.dtype)
        x = layer(STEM_FEATURES, 3, self.stem_stride, name="stem")(x, train)
        blocks = [block for stage in scaled_stages(VARIANTS[self.variant]) for block in stage]
        for i, block in enumerate(blocks):
            x = InvertedBottleneck(
                block.features,
                block.expansion,
                block.kernel,
                block.stride,
                dtype=self.dtype,
                name=f"block{i}",
            )(x, train)
        x = layer(HEAD_FEATURES, name="head")(x, train)
        x = global_average(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)


def scaled_stages(variant: Variant) -> list[list[Stage]]:
    """The blocks of each stage, as stages of one repeat."""
    stages = []
    for i, stage in enumerate(STAGES):
        fixed = i in (0, len(STAGES) - 1)
        repeats = stage.repeats if fixed else math.ceil(stage.repeats * variant.depth)
        first = stage._replace(repeats=1, features=scaled_features(stage.features, variant.width))
        stages.append([first] + [first._replace(stride=1)] * (repeats - 1))
    return stages


def scaled_features(features: int, width: float) -> int:
    """`features * width` as the nearest multiple of 8 that is not more than 10 % below it."""
    scaled = features * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
