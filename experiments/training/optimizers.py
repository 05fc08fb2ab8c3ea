"""Optimizers by name, with weight decay on the kernels alone."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.training import TrainingError
from experiments.training.schedules import Schedule

Params = dict[str, Any]

# (learning rate, momentum, Nesterov's form) -> optimizer.
OPTIMIZERS: dict[str, Callable[[Schedule, float, bool], optax.GradientTransformation]] = {
    "sgd": lambda rate, momentum, nesterov: optax.sgd(rate, momentum, nesterov),
    # As for MobileNet and EfficientNet.
    "rmsprop": lambda rate, momentum, nesterov: optax.rmsprop(
        rate, decay=0.9, eps=1e-3, momentum=momentum, nesterov=nesterov
    ),
}


def is_decayed(params: Params) -> Params:
    """True for the kernels of convolutions and dense layers; False for biases and BatchNorms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    name: str,
    rate: Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Clipping, weight decay and one of `OPTIMIZERS`, in this order.

    The decay is the gradient of `weight_decay / 2 * |kernel|^2`: it goes through the momentum and
    scales with the learning rate, as in the papers whose settings the configs take.

    Args:
      name: a key of `OPTIMIZERS`.
      rate: the schedule of the learning rate.
      momentum: of both optimizers.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: on what `is_decayed` says.
      clip_norm: of the whole gradient, which is scaled down to it; 0 for none.

    Raises:
      TrainingError: no optimizer has that name.
    """
    if name not in OPTIMIZERS:
        raise TrainingError(f"there is no optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.add_decayed_weights(weight_decay, mask=is_decayed),
        OPTIMIZERS[name](rate, momentum, nesterov),
    )
