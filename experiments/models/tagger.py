"""A recurrent tagger: every token of a text gets a class, by what stands before and behind it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

CELLS = {"lstm": nn.LSTMCell, "optimized_lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


class Tagger(nn.Module):
    """Ids of tokens [B, T] -> logits [B, T, num_classes]; one cell reads forwards, one backwards.

    Attributes:
      vocabulary: how many tokens there are.
      num_classes: K.
      width: of the embedding and of each cell's state.
      cell: "lstm", "optimized_lstm" (the same function, its gates' matrices joined) or "gru".
      unrolled: True: a Python loop over the T steps in the place of `nn.RNN`, for comparison; the
        parameters are the same.
    """

    vocabulary: int
    num_classes: int
    width: int = 64
    cell: str = "lstm"
    unrolled: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="tokens")(ids)
        run = _by_hand if self.unrolled else _scanned
        make = CELLS[self.cell]
        forward = run(make(self.width, name="forward"), x, reverse=False)
        backward = run(make(self.width, name="backward"), x, reverse=True)
        both = jnp.concatenate([forward, backward], axis=-1)
        return nn.Dense(self.num_classes, name="head")(both)


def _scanned(cell: nn.RNNCellBase, x: jax.Array, reverse: bool) -> jax.Array:
    return nn.RNN(cell, reverse=reverse, keep_order=True)(x)


def _by_hand(cell: nn.RNNCellBase, x: jax.Array, reverse: bool) -> jax.Array:
    batch, length, width = x.shape
    carry = cell.initialize_carry(jax.random.key(0), (batch, width))
    steps = range(length - 1, -1, -1) if reverse else range(length)
    outputs: dict[int, jax.Array] = {}
    for t in steps:
        carry, outputs[t] = cell(carry, x[:, t])
    return jnp.stack([outputs[t] for t in range(length)], axis=1)
