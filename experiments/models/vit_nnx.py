"""The vision transformer of `vit` in nnx, with the same names of layers and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers_nnx import make_layers, run, with_parameters
from experiments.models.transformer_nnx import Block


class Vit(nnx.Module):
    """Images [B, S, S, C] -> logits [B, num_classes], with the arguments of the linen one.

    Further ones say what linen finds in the first image: `size` is S, `channels` C.
    """

    def __init__(
        self,
        num_classes: int = 10,
        patch: int = 4,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        hidden: int = 256,
        scanned: bool = True,
        *,
        size: int,
        channels: int = 3,
        rngs: nnx.Rngs,
    ) -> None:
        sides = (patch, patch)
        tokens = (size // patch) ** 2 + 1
        self.patches = nnx.Conv(channels, width, sides, sides, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width), jnp.float32))
        draw = nnx.initializers.normal(0.02)
        self.positions = nnx.Param(draw(rngs.params(), (1, tokens, width), jnp.float32))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Block(width, heads, hidden, rngs), layers, scanned, rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        patches = self.patches(images)
        batch, rows, columns, width = patches.shape
        gatherer = jnp.broadcast_to(self.class_token[...], (batch, 1, width))
        x = jnp.concatenate([gatherer, patches.reshape(batch, rows * columns, width)], axis=1)
        x = run(x + self.positions[...], self.layers, None)
        return self.head(self.norm(x)[:, 0])


def from_linen(params: dict[str, Any], **settings: Any) -> Vit:
    """The network with the parameters of its linen twin.

    Args:
      params: of the scan, or of the loop where `scanned=False` is among the settings.
      **settings: what `Vit` was made with.
    """
    return with_parameters(lambda rngs: Vit(**settings, rngs=rngs), params)
