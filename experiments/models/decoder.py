"""Decoding by a network with a cache of keys and values, in one `lax.while_loop`.

`B` is the number of texts, `P` the length of what they begin with, `N` their whole length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.llama import Llama
from experiments.models.transformer import Transformer

Decoder = Transformer | Llama


class State(NamedTuple):
    """What one step of decoding hands the next.

    Attributes:
      position: of the token that the next step reads, int32[].
      ids: the texts so far, int32[B, N]; behind `position` only the first P are told.
      cache: the collection "cache" of the network.
      key: what the further tokens are drawn by; None: they are the likeliest ones.
    """

    position: jax.Array
    ids: jax.Array
    cache: Any
    key: jax.Array | None


def empty_cache(model: Decoder, batch: int) -> Any:
    """The cache before the first token, for texts of up to `model.length` tokens.

    Args:
      model: with `decode=True`.
      batch: B.
    """
    ids = jax.ShapeDtypeStruct((batch, model.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def step(
    model: Decoder, params: Any, ids: jax.Array, position: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    """One token, ids int32[B] at `position` -> logits [B, vocabulary] of the next; the cache."""
    variables = {"params": params, "cache": cache}
    logits, new = model.apply(variables, ids[:, None], position, mutable=["cache"])
    return logits[:, 0], new["cache"]


def generate(
    model: Decoder,
    params: Any,
    prompt: jax.Array,
    length: int,
    *,
    temperature: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Goes on with texts, by a token after the other: int32[B, P] -> int32[B, N].

    Each token is the likeliest one or, with a key, drawn from softmax(logits / temperature).  The
    tokens of the prompt go through the same step as those behind it, whose outcome they take the
    place of; so the loop is all there is.

    Args:
      model: with `decode=True`; one with the same settings trained the parameters.
      params: its parameters.
      prompt: what the texts begin with; P is at least 1.
      length: N, from P to `model.length`.
      temperature: above 0; the smaller, the more often the likeliest token is drawn.
      key: of `jax.random`; the same key gives the same texts.

    Raises:
      ValueError: the length or the temperature is none of these.
    """
    batch, given = prompt.shape
    if not 1 <= given <= length <= model.length:
        raise ValueError(
            f"length={length} is not between the {given} tokens of the prompt and the network's "
            f"{model.length}, or the prompt is empty"
        )
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature} is not above 0; without a key the likeliest token is taken"
        )

    def is_unfinished(state: State) -> jax.Array:
        return state.position < length - 1

    def advance(state: State) -> State:
        ids = jax.lax.dynamic_index_in_dim(state.ids, state.position, axis=1, keepdims=False)
        logits, cache = step(model, params, ids, state.position, state.cache)
        following = state.position + 1
        told = jax.lax.dynamic_index_in_dim(state.ids, following, axis=1, keepdims=False)
        found, key = _choose(logits, temperature, state.key)
        chosen = jnp.where(following < given, told, found)
        return State(following, state.ids.at[:, following].set(chosen), cache, key)

    ids = jnp.zeros((batch, length), jnp.int32).at[:, :given].set(prompt)
    start = State(jnp.zeros((), jnp.int32), ids, empty_cache(model, batch), key)
    return jax.lax.while_loop(is_unfinished, advance, start).ids


def _choose(
    logits: jax.Array, temperature: float, key: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """A token for each row of logits, int32[B], and the key of the next step."""
    if key is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    following, drawn = jax.random.split(key)
    return jax.random.categorical(drawn, logits / temperature).astype(jnp.int32), following
