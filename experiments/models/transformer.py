"""A small transformer that tells each token from those before it, its layers scanned or in a loop.

`L` is the number of layers, `D` the width, `F` the features between the two dense layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Block(nn.Module):
    """Attention and two dense layers, each behind its LayerNorm: [B, T, D] -> [B, T, D], None.

    The None is what `nn.scan` stacks: no layer gives anything beside what the next one reads.

    Attributes:
      heads: of the attention; they divide D.
      hidden: F.
      decode: True: one token a call, keys and values of those before it in the collection "cache".
      dtype: of the attention's arithmetic.
    """

    heads: int
    hidden: int
    decode: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, None]:
        normalized = nn.LayerNorm(name="attention_norm")(x)
        attention = nn.MultiHeadDotProductAttention(
            self.heads, decode=self.decode, dtype=self.dtype, name="attention"
        )
        x = x + attention(normalized, mask=mask)
        normalized = nn.LayerNorm(name="dense_norm")(x)
        hidden = nn.gelu(nn.Dense(self.hidden, name="up")(normalized))
        return x + nn.Dense(x.shape[-1], name="down")(hidden), None


class Transformer(nn.Module):
    """Ids of tokens [B, T] -> logits [B, T, vocabulary] of the token that follows each.

    Attributes:
      vocabulary: how many tokens there are.
      layers: L.
      width: D.
      heads: of each attention.
      hidden: F.
      length: of the longest text.
      scanned: True: one `nn.scan` over the layers, whose parameters are stacked, [L, ...], under
        "layers"; False: a Python loop over "layers_0" to "layers_{L-1}".  `stack` and `unstack`
        make the parameters of one those of the other.
      decode: True: T is 1, and the tokens before it are in the collection "cache".
      dtype: of the attentions' arithmetic.
    """

    vocabulary: int
    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int = 256
    length: int = 64
    scanned: bool = True
    decode: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """`start`: the position of the first token in its text, int32."""
        positions = start + jnp.arange(ids.shape[1], dtype=jnp.int32)
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(ids)
        x = x + nn.Embed(self.length, self.width, name="positions")(positions)
        mask = None if self.decode else nn.make_causal_mask(ids)
        settings = {"heads": self.heads, "hidden": self.hidden}
        settings |= {"decode": self.decode, "dtype": self.dtype}
        if self.scanned:
            stacked = scanned(Block, self.layers)
            x, _ = stacked(**settings, name="layers")(x, mask)
        else:
            for number in range(self.layers):
                x, _ = Block(**settings, name=f"layers_{number}")(x, mask)
        return nn.Dense(self.vocabulary, name="head")(nn.LayerNorm(name="norm")(x))


def scanned(block: type[nn.Module], layers: int) -> Any:
    """The module of so many blocks, one after the other, with their parameters stacked.

    Args:
      block: takes (x, what all layers read alike) and gives (x, None).
      layers: how many.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0, "cache": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=layers,
    )


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a Python loop over layers as those of a scan."""
    names = sorted((name for name in params if name.startswith("layers_")), key=_number)
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    rest = {name: leaf for name, leaf in params.items() if name not in names}
    return {**rest, "layers": layers}


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a scan over layers as those of a Python loop."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**rest, **{f"layers_{i}": _layer(params["layers"], i) for i in range(count)}}


def _layer(stacked: dict[str, Any], number: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[number], stacked)


def _number(name: str) -> int:
    return int(name.removeprefix("layers_"))
