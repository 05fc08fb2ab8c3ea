"""The transformer of `transformer` in nnx, with the same names of layers and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers_nnx import make_layers, run, with_parameters


class Block(nnx.Module):
    """Attention and two dense layers, each behind its LayerNorm: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, decode=False, dtype=jnp.float32, rngs=rngs, keep_rngs=False
        )
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.dense_norm(x))))


class Transformer(nnx.Module):
    """Ids of tokens [B, T] -> logits [B, T, vocabulary], with the arguments of the linen one."""

    def __init__(
        self,
        vocabulary: int,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        hidden: int = 256,
        length: int = 64,
        scanned: bool = True,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Block(width, heads, hidden, rngs), layers, scanned, rngs
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1], dtype=jnp.int32))
        return self.head(self.norm(run(x, self.layers, nnx.make_causal_mask(ids))))


def from_linen(params: dict[str, Any], **settings: Any) -> Transformer:
    """The network with the parameters of its linen twin.

    Args:
      params: of the scan, or of the loop where `scanned=False` is among the settings.
      **settings: what `Transformer` was made with.
    """
    return with_parameters(lambda rngs: Transformer(**settings, rngs=rngs), params)
