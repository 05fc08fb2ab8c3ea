"""Small decoders with a cache of keys and values, in linen, nnx and as a plain function.

Each function returns `(params, cache, apply_fn)` with `apply_fn(params, cache, tokens) ->
(logits, cache)`: a cache for `BATCH` sequences of up to `LENGTH` tokens, random weights.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

VOCABULARY, WIDTH, HEADS, LENGTH, BATCH = 32, 16, 2, 8, 2
HIDDEN = 2 * WIDTH


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        table = self.param("positions", nn.initializers.normal(0.1), (LENGTH, WIDTH))
        is_ready = self.has_variable("cache", "position")
        position = self.variable("cache", "position", lambda: jnp.array(0, jnp.int32))
        if is_ready:
            x = x + jax.lax.dynamic_slice_in_dim(table, position.value, 1)
            position.value += 1
        x = x + nn.MultiHeadDotProductAttention(HEADS, decode=True)(nn.LayerNorm()(x))
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(HIDDEN)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY, name="head")(x)


def linen():
    """Takes one token a call; the cache comes back as `mutable=["cache"]` gives it."""
    model = LinenDecoder()
    variables = model.init(jax.random.key(0), jnp.zeros((BATCH, LENGTH), jnp.int32))

    def apply_fn(params, cache, tokens):
        logits, updated = model.apply({**params, "cache": cache}, tokens, mutable=["cache"])
        return logits, updated["cache"]

    return {"params": variables["params"]}, variables["cache"], apply_fn


class _NnxDecoder(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
        self.attention = nnx.List(
            [nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, rngs=rngs) for _ in range(2)]
        )
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)
        self.position = nnx.Cache(jnp.array(0, jnp.int32))

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions(self.position[...])
        self.position[...] += 1
        for attention in self.attention:
            x = x + attention(x)
        return self.embed.attend(x + self.down(nnx.gelu(self.up(x))))


def nnx_():
    """Takes one token a call; the cache is the state that `nnx.split` sets apart."""
    model = _NnxDecoder(nnx.Rngs(0))
    for attention in model.attention:
        attention.init_cache((BATCH, LENGTH, WIDTH))
    graphdef, params, cache, rest = nnx.split(model, nnx.Param, nnx.Cache, ...)

    def apply_fn(params, cache, tokens):
        model = nnx.merge(graphdef, params, cache, rest)
        return model(tokens), nnx.state(model, nnx.Cache)

    return params, cache, apply_fn


def plain(rotary=False):
    """Takes any number of tokens a call; its positions are learned, or rotate keys and queries."""
    return plain_params(), plain_cache(), functools.partial(plain_decoder, rotary=rotary)


def plain_params():
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def weight(*shape):
        return {"w": jax.random.normal(next(keys), shape) / np.sqrt(shape[0])}

    return {
        "embed": weight(VOCABULARY, WIDTH),
        "positions": weight(LENGTH, WIDTH),
        "qkv": weight(WIDTH, 3 * WIDTH),
        "out": weight(WIDTH, WIDTH),
        "up": weight(WIDTH, HIDDEN),
        "down": weight(HIDDEN, WIDTH),
        "head": weight(WIDTH, VOCABULARY),
    }


def plain_cache(batch=BATCH):
    empty = jnp.zeros((batch, LENGTH, HEADS, WIDTH // HEADS))
    return {"k": empty, "v": empty, "index": jnp.array(0, jnp.int32)}


def plain_decoder(p, cache, tokens, rotary):
    count = tokens.shape[1]
    index = cache["index"]
    positions = index + jnp.arange(count)
    x = p["embed"]["w"][tokens]
    if not rotary:
        x = x + jax.lax.dynamic_slice_in_dim(p["positions"]["w"], index, count)
    q, k, v = _heads(p, x)
    if rotary:
        q, k = rotated(q, positions), rotated(k, positions)
    k, v = (
        jax.lax.dynamic_update_slice_in_dim(cache[name], new, index, axis=1)
        for name, new in (("k", k), ("v", v))
    )
    x = _behind_keys(p, x, q, k, v, jnp.arange(LENGTH) <= positions[:, None])
    return x, {"k": k, "v": v, "index": index + count}


def whole_sequence(p, tokens, valid=None, *, rotary=False):
    """The same network without a cache: logits of every position of `tokens` [B, S].

    `valid` [B, S] are the truth values of tokens that are none of padding.
    """
    count = tokens.shape[1]
    x = p["embed"]["w"][tokens]
    if not rotary:
        x = x + p["positions"]["w"][:count]
    q, k, v = _heads(p, x)
    if rotary:
        q, k = (rotated(each, jnp.arange(count)) for each in (q, k))
    mask = jnp.tril(jnp.ones((count, count), bool))
    if valid is not None:
        mask = mask & valid[:, None, None, :]
    return _behind_keys(p, x, q, k, v, mask)


def _heads(p, x):
    parts = jnp.split(x @ p["qkv"]["w"], 3, axis=-1)
    return (part.reshape(*x.shape[:2], HEADS, WIDTH // HEADS) for part in parts)


def _behind_keys(p, x, q, k, v, mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(WIDTH // HEADS))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    x = x + mixed.reshape(x.shape) @ p["out"]["w"]
    x = x + jax.nn.gelu(x @ p["up"]["w"]) @ p["down"]["w"]
    return x @ p["head"]["w"]


def rotated(x, positions):
    """Pairs of features [B, S, H, D] turned by an angle that grows with the position [S]."""
    pairs = x.shape[-1] // 2
    speeds = 1 / 100 ** (jnp.arange(pairs, dtype=jnp.float32) / pairs)
    angles = (positions[:, None].astype(jnp.float32) * speeds)[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def tokens(seed, count, batch=BATCH):
    """Random tokens [batch, count]."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, count)).astype(np.int32)


def decode(apply_fn, params, cache, sequence, counts):
    """Feed a sequence [B, S] in steps of so many tokens.

    Returns the logits [B, S, V], the last cache and what `apply_fn` was given in each step.
    """
    given, logits, start = [], [], 0
    for count in counts:
        given.append((cache, sequence[:, start : start + count]))
        start += count
        found, cache = apply_fn(params, *given[-1])
        logits.append(found)
    return jnp.concatenate(logits, axis=1), cache, given
