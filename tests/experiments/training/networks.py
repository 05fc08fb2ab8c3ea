"""A network that compiles quickly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from experiments.models.layers import ConvBN, global_average


class Small(nn.Module):
    """One convolution with BatchNorm, dropout and a classifier: [B, H, W, 3] -> [B, K]."""

    num_classes: int = 3
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = ConvBN(4, 3, activation=nn.relu, dtype=self.dtype, name="stem")(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(global_average(x))
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="classifier")(x)
