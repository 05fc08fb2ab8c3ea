"""The learning rate as a function of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.training import TrainingError

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def warmup_cosine(peak: float, steps: int, warmup_steps: int = 0) -> Schedule:
    r"""A linear rise to `peak`, then half a cosine down to zero.

    .. math::
      \eta(t) = \eta \frac{t + 1}{w} \text{ for } t < w, \text{ else }
      \frac{\eta}{2} \left(1 + \cos \frac{\pi (t - w)}{T - w}\right)

    Args:
      peak: the highest learning rate, η.
      steps: T, after which it stays at zero.
      warmup_steps: w; no step has the rate zero.

    Raises:
      TrainingError: `peak` is not positive or the warmup is not shorter than the run.

    References: Loshchilov and Hutter, "SGDR", ICLR 2017; the warmup: Goyal et al., "Accurate, Large
    Minibatch SGD", arXiv:1706.02677.

    >>> rate = warmup_cosine(peak=1.0, steps=6, warmup_steps=2)
    >>> [round(float(rate(t)), 2) for t in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if not peak > 0:
        raise TrainingError(f"the learning rate is {peak}: it should be positive")
    if not 0 <= warmup_steps < steps:
        raise TrainingError(
            f"a warmup of {warmup_steps} steps in a run of {steps}: it should be shorter "
            "(--config.warmup_epochs)"
        )

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        rising = (jnp.asarray(step) + 1) / max(warmup_steps, 1)
        done = jnp.clip((jnp.asarray(step) - warmup_steps) / (steps - warmup_steps), 0, 1)
        falling = (1 + jnp.cos(jnp.pi * done)) / 2
        return peak * jnp.where(jnp.asarray(step) < warmup_steps, rising, falling)

    return rate
