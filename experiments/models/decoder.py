"""Greedy decoding by a transformer with a cache of keys and values, in one `lax.while_loop`.

`B` is the number of texts, `P` the length of what they begin with, `N` their whole length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.transformer import Transformer


class State(NamedTuple):
    """What one step of decoding hands the next.

    Attributes:
      position: of the token that the next step reads, int32[].
      ids: the texts so far, int32[B, N]; behind `position` only the first P are told.
      cache: the collection "cache" of the network.
    """

    position: jax.Array
    ids: jax.Array
    cache: Any


def empty_cache(model: Transformer, batch: int) -> Any:
    """The cache before the first token, for texts of up to `model.length` tokens.

    Args:
      model: with `decode=True`.
      batch: B.
    """
    ids = jax.ShapeDtypeStruct((batch, model.length), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def step(
    model: Transformer, params: Any, ids: jax.Array, position: jax.Array, cache: Any
) -> tuple[jax.Array, Any]:
    """One token, ids int32[B] at `position` -> logits [B, vocabulary] of the next; the cache."""
    variables = {"params": params, "cache": cache}
    logits, new = model.apply(variables, ids[:, None], position, mutable=["cache"])
    return logits[:, 0], new["cache"]


def generate(model: Transformer, params: Any, prompt: jax.Array, length: int) -> jax.Array:
    """Goes on with texts, by the likeliest token each time: int32[B, P] -> int32[B, N].

    The tokens of the prompt go through the same step as those behind it, whose outcome they take
    the place of; so the loop is all there is.

    Args:
      model: with `decode=True`; one with the same settings trained the parameters.
      params: its parameters.
      prompt: what the texts begin with; P is at least 1.
      length: N, from P to `model.length`.
    """
    batch, given = prompt.shape
    if not 1 <= given <= length <= model.length:
        raise ValueError(
            f"length={length} is not between the {given} tokens of the prompt and the network's "
            f"{model.length}, or the prompt is empty"
        )

    def is_unfinished(state: State) -> jax.Array:
        return state.position < length - 1

    def advance(state: State) -> State:
        ids = jax.lax.dynamic_index_in_dim(state.ids, state.position, axis=1, keepdims=False)
        logits, cache = step(model, params, ids, state.position, state.cache)
        following = state.position + 1
        told = jax.lax.dynamic_index_in_dim(state.ids, following, axis=1, keepdims=False)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        chosen = jnp.where(following < given, told, likeliest)
        return State(following, state.ids.at[:, following].set(chosen), cache)

    ids = jnp.zeros((batch, length), jnp.int32).at[:, :given].set(prompt)
    start = State(jnp.zeros((), jnp.int32), ids, empty_cache(model, batch))
    return jax.lax.while_loop(is_unfinished, advance, start).ids
