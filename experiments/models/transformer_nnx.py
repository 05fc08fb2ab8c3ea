"""The transformer of `transformer` in nnx, with the same names of layers and parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


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

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
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
        self.scanned = scanned
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(length, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)
        if scanned:

            @nnx.split_rngs(splits=layers)
            @nnx.vmap
            def make(rngs: nnx.Rngs) -> Block:
                return Block(width, heads, hidden, rngs)

            self.layers = make(rngs)
        else:
            self.layers = nnx.List(Block(width, heads, hidden, rngs) for _ in range(layers))

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.tokens(ids) + self.positions(jnp.arange(ids.shape[1], dtype=jnp.int32))
        mask = nnx.make_causal_mask(ids)
        if self.scanned:
            x = _run(x, self.layers, mask)
        else:
            for layer in self.layers:
                x = layer(x, mask)
        return self.head(self.norm(x))


@nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
def _run(x: jax.Array, layer: Block, mask: jax.Array) -> jax.Array:
    return layer(x, mask)


def from_linen(params: dict[str, Any], **settings: Any) -> Transformer:
    """The network with the parameters of its linen twin.

    Args:
      params: of the scan, or of the loop where `scanned=False` is among the settings.
      **settings: what `Transformer` was made with.
    """
    model = nnx.eval_shape(lambda: Transformer(**settings, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = {
        path: variable.replace(jnp.asarray(_leaf(params, path)))
        for path, variable in nnx.to_flat_state(state)
    }
    return nnx.merge(graph, nnx.from_flat_state(flat.items()))


def _leaf(params: dict[str, Any], path: tuple[str | int, ...]) -> jax.Array:
    """The leaf of linen's parameters for a path of nnx's, where a layer has a number."""
    if path[0] == "layers" and isinstance(path[1], int):
        path = (f"layers_{path[1]}", *path[2:])
    leaf: Any = params
    for key in path:
        leaf = leaf[key]
    return leaf
