"""A small Llama: RMSNorm, rotary positions, queries that share keys and values, SwiGLU.

After Touvron et al. (arXiv:2302.13971) with the grouped queries of Ainslie et al.
(arXiv:2305.13245).  No layer has a bias.  `L` is the number of layers, `D` the width, `H` the heads
of the queries, `G` those of the keys and values, `E = D / H` the features of a head, `F` the
features between the dense layers, `S` the keys that a query may see.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.transformer import scanned

EPSILON = 1e-5  # of the RMSNorms
BASE = 10000.0  # of the wavelengths: the slowest pair of features turns once in 2π times so many


class Context(NamedTuple):
    """What all layers read alike.

    Attributes:
      start: the position of the first token in its text, int32[].
      cos: of the angles that queries and keys are turned by, [T, 1, E / 2].
      sin: of the same.
      mask: bool[T, S], which keys a query may see.
    """

    start: jax.Array
    cos: jax.Array
    sin: jax.Array
    mask: jax.Array


def context(start: jax.Array | int, tokens: int, keys: int, features: int) -> Context:
    """The context of tokens that see themselves and those before them.

    Args:
      start: the position of the first token.
      tokens: T.
      keys: S, whose positions begin at 0.
      features: E, an even number.
    """
    positions = start + jnp.arange(tokens, dtype=jnp.int32)
    exponents = np.arange(0, features, 2, dtype=np.float32) / features
    speeds = (1 / BASE**exponents).astype(np.float32)
    angles = (positions.astype(jnp.float32)[:, None] * speeds)[:, None, :]
    mask = jnp.arange(keys, dtype=jnp.int32) <= positions[:, None]
    return Context(jnp.asarray(start, jnp.int32), jnp.cos(angles), jnp.sin(angles), mask)


def rotated(x: jax.Array, given: Context) -> jax.Array:
    """Pairs of features, one of each half, turned by their positions' angles: [B, T, H, E]."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = first * given.cos - second * given.sin, first * given.sin + second * given.cos
    return jnp.concatenate(turned, axis=-1)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """What queries [B, T, H, E] find among keys and values [B, S, G, E]: [B, T, H, E].

    Query h reads the keys and values of group h // (H / G), which are not repeated for it: those of
    one group are beside each other.
    """
    batch, tokens, heads, features = query.shape
    groups = key.shape[2]
    grouped = query.reshape(batch, tokens, groups, heads // groups, features)
    scores = jnp.einsum("btghe,bsge->bghts", grouped, key) / np.float32(np.sqrt(features))
    weights = nn.softmax(jnp.where(mask, scores, np.finfo(np.float32).min))
    return jnp.einsum("bghts,bsge->btghe", weights, value).reshape(query.shape)


class Attention(nn.Module):
    """Grouped queries with rotary positions: [B, T, D] -> [B, T, D].

    Attributes:
      heads: H; they divide D.
      groups: G; they divide H.
      decode: True: keys and values of all tokens so far are in the collection "cache", [B, S, G, E]
        each; those of this call take the places from `start` on.
    """

    heads: int
    groups: int
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, given: Context) -> jax.Array:
        width = x.shape[-1]
        features = width // self.heads

        def project(name: str, heads: int) -> jax.Array:
            return nn.DenseGeneral((heads, features), use_bias=False, name=name)(x)

        query = rotated(project("query", self.heads), given)
        key = rotated(project("key", self.groups), given)
        value = project("value", self.groups)
        if self.decode:
            key, value = (
                self._kept("cached_key", key, given),
                self._kept("cached_value", value, given),
            )
        mixed = attend(query, key, value, given.mask)
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="out")(mixed)

    def _kept(self, name: str, new: jax.Array, given: Context) -> jax.Array:
        """What the cache holds after this call; the first call makes it, of as many tokens."""
        is_made = self.has_variable("cache", name)
        cache = self.variable("cache", name, jnp.zeros, new.shape, new.dtype)
        if is_made:
            zero = jnp.zeros((), jnp.int32)
            places = (zero, given.start, zero, zero)
            cache.value = jax.lax.dynamic_update_slice(cache.value, new, places)
        return cache.value


class Block(nn.Module):
    """Attention and SwiGLU, each behind its RMSNorm: [B, T, D] -> [B, T, D], None.

    The None is what `nn.scan` stacks: no layer gives anything beside what the next one reads.

    Attributes:
      heads: H.
      groups: G.
      hidden: F.
      decode: see `Attention`.
    """

    heads: int
    groups: int
    hidden: int
    decode: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, given: Context) -> tuple[jax.Array, None]:
        attention = Attention(self.heads, self.groups, self.decode, name="attention")
        x = x + attention(nn.RMSNorm(EPSILON, name="attention_norm")(x), given)
        normalized = nn.RMSNorm(EPSILON, name="dense_norm")(x)
        gate = nn.silu(nn.Dense(self.hidden, use_bias=False, name="gate")(normalized))
        hidden = gate * nn.Dense(self.hidden, use_bias=False, name="up")(normalized)
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(hidden), None


class Llama(nn.Module):
    """Ids of tokens [B, T] -> logits [B, T, vocabulary] of the token that follows each.

    Attributes:
      vocabulary: how many tokens there are.
      layers: L.
      width: D.
      heads: H; they divide D into even numbers of features.
      groups: G; they divide H.
      hidden: F.
      length: of the cache; texts without one may be of any length.
      tied: True: the embedding's table gives the logits too; False: a layer "head" does.
      scanned: True: one `nn.scan` over the layers, whose parameters are stacked, [L, ...], under
        "layers"; False: a Python loop over "layers_0" to "layers_{L-1}".  `stack` and `unstack` in
        `experiments.models.transformer` make the parameters of one those of the other.
      decode: True: keys and values of the tokens so far are in the collection "cache".
    """

    vocabulary: int
    layers: int = 4
    width: int = 64
    heads: int = 4
    groups: int = 2
    hidden: int = 176
    length: int = 64
    tied: bool = True
    scanned: bool = True
    decode: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, start: jax.Array | int = 0) -> jax.Array:
        """`start`: the position of the first token in its text, int32."""
        embed = nn.Embed(self.vocabulary, self.width, name="tokens")
        x = embed(ids)
        tokens = ids.shape[1]
        keys = self.length if self.decode else tokens
        given = context(start, tokens, keys, self.width // self.heads)
        settings = (self.heads, self.groups, self.hidden, self.decode)
        if self.scanned:
            x, _ = scanned(Block, self.layers)(*settings, name="layers")(x, given)
        else:
            for number in range(self.layers):
                x, _ = Block(*settings, name=f"layers_{number}")(x, given)
        x = nn.RMSNorm(EPSILON, name="norm")(x)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="head")(x)
