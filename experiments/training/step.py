"""One step of training, on one device or split over several."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.preprocessing import Preprocessing
from experiments.training import TrainingError
from experiments.weights.tree import Variables

Metrics = dict[str, jax.Array]


class State(NamedTuple):
    """All that a run needs to go on.

    Attributes:
      step: how many steps have been taken, int32 [].
      variables: of the network: "params" and, with BatchNorm, "batch_stats".
      optimizer: the optimizer's state.
    """

    step: jax.Array
    variables: Variables
    optimizer: Any


Update = Callable[[State, np.ndarray, np.ndarray], tuple[State, Metrics]]


def initial_state(variables: Variables, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    params = jax.tree.map(jnp.asarray, variables["params"])
    return State(jnp.zeros((), jnp.int32), variables, optimizer.init(params))


def data_parallel(batch_size: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over which batches are split evenly and the state is replicated.

    Raises:
      TrainingError: the batch cannot be split evenly.
    """
    if batch_size % len(devices):
        raise TrainingError(
            f"a batch of {batch_size} cannot be split over {len(devices)} devices: give a multiple "
            "as --config.batch_size, or fewer --config.devices"
        )
    return Mesh(np.asarray(devices), ("data",))


def make_update(
    module: nn.Module,
    optimizer: optax.GradientTransformation,
    preprocessing: Preprocessing,
    mesh: Mesh,
    *,
    label_smoothing: float,
    seed: int,
) -> Update:
    """The compiled step: gradient, BatchNorm statistics, optimizer.

    BatchNorm sees the whole batch, over all devices. The loss and the parameters are float32
    whatever the network computes in.

    Args:
      module: called with `train=True`.
      optimizer: takes the gradient.
      preprocessing: what the network expects of the pixels.
      mesh: the devices.
      label_smoothing: the share of the target that is spread over all classes.
      seed: of the dropout.

    Returns:
      (state, images [B, S, S, 3] uint8, labels [B] int32) -> (state, metrics): "loss",
      "accuracy" in percent and "gradient_norm". The given state is used up.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec("data"))

    def update(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, Metrics]:
        inputs = preprocessing.normalise(images)
        statistics = {k: v for k, v in state.variables.items() if k != "params"}
        dropout = jax.random.fold_in(jax.random.key(seed), state.step)

        def loss_of(params: Any) -> tuple[jax.Array, tuple[jax.Array, Variables]]:
            logits, changed = module.apply(
                {"params": params, **statistics},
                inputs,
                train=True,
                mutable=list(statistics),
                rngs={"dropout": dropout},
            )
            targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
            targets = optax.smooth_labels(targets, label_smoothing)
            return optax.softmax_cross_entropy(logits, targets).mean(), (logits, changed)

        params = state.variables["params"]
        (loss, (logits, changed)), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, params)
        variables = {"params": optax.apply_updates(params, updates), **changed}
        metrics = {
            "loss": loss,
            "accuracy": 100 * jnp.mean(logits.argmax(axis=-1) == labels, dtype=jnp.float32),
            "gradient_norm": norm(gradient),
        }
        return State(state.step + 1, variables, optimizer_state), metrics

    return jax.jit(
        update,
        in_shardings=(replicated, split, split),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all numbers of a tree."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
