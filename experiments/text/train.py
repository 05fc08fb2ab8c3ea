"""Training on windows of a text: cross entropy at every character, Adam with a cosine schedule."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.text.corpus import Labelled
from experiments.training.schedules import warmup_cosine

BATCH = 32
LEARNING_RATE = 3e-3


def train(
    module: nn.Module,
    text: Labelled,
    length: int,
    steps: int,
    seed: int = 0,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> Any:
    """The parameters after training.

    Args:
      module: ids [B, T] -> logits [B, T, K].
      text: to train on.
      length: T.
      steps: of the optimizer, each on 32 windows at random places; 0 gives random parameters.
      seed: of the parameters and the places.
      show: is told the number and the loss of each step that is a multiple of 100.
    """
    ids = jnp.zeros((1, length), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(seed), ids)["params"]
    if steps == 0:
        return params
    schedule = warmup_cosine(LEARNING_RATE, steps, steps // 10)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = optimizer.init(params)

    @jax.jit
    def advance(params: Any, state: Any, ids: jax.Array, labels: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits = module.apply({"params": params}, ids)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    random = np.random.default_rng(seed)
    offsets = np.arange(length)
    for number in range(steps):
        places = random.integers(0, len(text.ids) - length, (BATCH, 1)) + offsets
        params, state, loss = advance(params, state, text.ids[places], text.labels[places])
        if number % 100 == 0:
            show(number, float(loss))
    return params


def accuracy(apply: Callable[[jax.Array], jax.Array], windows: Labelled, batch: int = 50) -> float:
    """The share of characters at which the likeliest class is the label.

    Args:
      apply: ids [B, T] -> logits [B, T, K].
      windows: see `Labelled.windows`; those that do not fill a batch are left out.
      batch: B.
    """
    right = [
        np.mean(np.argmax(apply(ids), axis=-1) == labels)
        for ids, labels in zip(_batches(windows.ids, batch), _batches(windows.labels, batch))
    ]
    return float(np.mean(right))


def _batches(x: np.ndarray, batch: int) -> list[np.ndarray]:
    return [x[i : i + batch] for i in range(0, len(x) - batch + 1, batch)]
