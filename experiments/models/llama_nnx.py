"""The Llama of `llama` in nnx, with the same names of layers and parameters."""

from typing import Any

import jax
from flax import nnx

from experiments.models.layers_nnx import make_layers, run, with_parameters
from experiments.models.llama import EPSILON, Context, attend, context, rotated


class Attention(nnx.Module):
    """Grouped queries with rotary positions: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, groups: int, rngs: nnx.Rngs) -> None:
        def linear(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(width, (heads, features), use_bias=False, rngs=rngs)

        features = width // heads
        self.query, self.key, self.value = linear(heads), linear(groups), linear(groups)
        self.out = nnx.LinearGeneral(
            (heads, features), width, axis=(-2, -1), use_bias=False, rngs=rngs
        )

    def __call__(self, x: jax.Array, given: Context) -> jax.Array:
        query, key = rotated(self.query(x), given), rotated(self.key(x), given)
        return self.out(attend(query, key, self.value(x), given.mask))


class Block(nnx.Module):
    """Attention and SwiGLU, each behind its RMSNorm: [B, T, D] -> [B, T, D]."""

    def __init__(self, width: int, heads: int, groups: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attention = Attention(width, heads, groups, rngs)
        self.dense_norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array, given: Context) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), given)
        normalized = self.dense_norm(x)
        return x + self.down(nnx.silu(self.gate(normalized)) * self.up(normalized))


class Llama(nnx.Module):
    """Ids of tokens [B, T] -> logits [B, T, vocabulary], with arguments of the linen one.

    It has no cache, so none of the arguments that are about one.
    """

    def __init__(
        self,
        vocabulary: int,
        layers: int = 4,
        width: int = 64,
        heads: int = 4,
        groups: int = 2,
        hidden: int = 176,
        tied: bool = True,
        scanned: bool = True,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.features = width // heads
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.norm = nnx.RMSNorm(width, epsilon=EPSILON, rngs=rngs)
        self.head = None if tied else nnx.Linear(width, vocabulary, use_bias=False, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Block(width, heads, groups, hidden, rngs), layers, scanned, rngs
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        tokens = ids.shape[1]
        given = context(0, tokens, tokens, self.features)
        x = self.norm(run(self.tokens(ids), self.layers, given))
        return self.tokens.attend(x) if self.head is None else self.head(x)


def from_linen(params: dict[str, Any], **settings: Any) -> Llama:
    """The network with the parameters of its linen twin.

    Args:
      params: of the scan, or of the loop where `scanned=False` is among the settings.
      **settings: what `Llama` was made with.
    """
    return with_parameters(lambda rngs: Llama(**settings, rngs=rngs), params)
