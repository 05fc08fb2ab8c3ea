"""BERT's encoder as a sentence model: all tokens see each other, padding nobody.

`L` is the number of layers, `D` the width, `F` the features between the two dense layers.  The
default is MiniLM-L6 (Wang et al., arXiv:2002.10957) as sentence-transformers trained it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.transformer import scanned

PADDING = 0
EPSILON = 1e-12  # of the LayerNorms


class Block(nn.Module):
    """Attention and two dense layers, each before its LayerNorm: [B, T, D] -> [B, T, D], None.

    The None is what `nn.scan` stacks: no layer gives anything beside what the next one reads.

    Attributes:
      heads: of the attention; they divide D.
      hidden: F.
    """

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        attention = nn.MultiHeadDotProductAttention(self.heads, name="attention")
        x = nn.LayerNorm(EPSILON, name="attention_norm")(x + attention(x, mask=mask))
        hidden = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        hidden = nn.Dense(x.shape[-1], name="down")(hidden)
        return nn.LayerNorm(EPSILON, name="dense_norm")(x + hidden), None


class Bert(nn.Module):
    """Ids of tokens [B, T], 0 for padding -> the sentences' embeddings [B, D], of length one.

    Attributes:
      vocabulary: how many tokens there are.
      layers: L.
      width: D.
      heads: of each attention.
      hidden: F.
      length: of the longest text.
      scanned: True: one `nn.scan` over the layers, whose parameters are stacked, [L, ...], under
        "layers"; False: a Python loop over "layers_0" to "layers_{L-1}".  `stack` and `unstack` in
        `experiments.models.transformer` make the parameters of one those of the other.
    """

    vocabulary: int = 30522
    layers: int = 6
    width: int = 384
    heads: int = 12
    hidden: int = 1536
    length: int = 512
    scanned: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="words")(ids)
        x = x + nn.Embed(self.length, self.width, name="positions")(jnp.arange(ids.shape[1]))
        x = x + nn.Embed(2, self.width, name="types")(jnp.zeros_like(ids))
        x = nn.LayerNorm(EPSILON, name="norm")(x)
        is_text = ids != PADDING
        mask = is_text[:, None, None, :]
        if self.scanned:
            stacked = scanned(Block, self.layers)
            x, _ = stacked(self.heads, self.hidden, name="layers")(x, mask)
        else:
            for number in range(self.layers):
                x, _ = Block(self.heads, self.hidden, name=f"layers_{number}")(x, mask)
        weights = is_text[..., None].astype(x.dtype)
        mean = jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
        return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), EPSILON)
