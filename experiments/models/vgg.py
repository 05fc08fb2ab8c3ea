"""VGG16 and VGG19, without BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.convolution import for_training
from experiments.models.layers import both_sides

# Convolutions in each of the five blocks, and their features.
REPEATS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
FEATURES = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images [B, H, W, 3], float32 -> logits [B, num_classes].

    The first dense layer sees the whole last feature map, so its weights belong to one image size:
    224 for the published ones.

    Attributes:
      depth: 16 or 19 layers.
      num_classes: K.
      dropout: after the two hidden dense layers, in training.
      dtype: of the computation; the logits are float32.

    Reference: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015.
    """

    depth: int = 16
    num_classes: int = 1000
    dropout: float = 0.5
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for i, (repeats, features) in enumerate(zip(REPEATS[self.depth], FEATURES), start=1):
            for j in range(1, repeats + 1):
                name = f"block{i}_conv{j}"
                conv = nn.Conv(
                    features,
                    (3, 3),
                    padding=both_sides(1),
                    dtype=self.dtype,
                    conv_general_dilated=for_training(train),
                    name=name,
                )
                x = nn.relu(conv(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for name in ("fc1", "fc2"):
            x = nn.relu(nn.Dense(4096, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)
