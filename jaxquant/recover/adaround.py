"""Learned rounding: each weight of a site goes down or up, as the site's outputs like it best.

M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020.  Sites in
order, each on the inputs that the int8 model gives it, with the earlier ones rounded already,
against the float model's outputs behind the activation (the paper's asymmetric reconstruction).
A weight is floor(w / s) + h(v), h(v) = clip(1.2 σ(v) - 0.1, 0, 1), and v minimises

    E |f(y) - f(ŷ)|² / E₀ + λ mean(1 - |2 h(v) - 1|^β),   β from 20 to 2 after a warm-up

with E₀ the error of nearest rounding.  At the end h is 0 or 1.  A quarter of the positions (the
last samples) is held out: where their error does not fall, nearest rounding stays.

Other than in the paper, a site is a product of matrices on at most 4096 output positions drawn
once, so a step costs no convolution, and steps are fewer (500 instead of 10 000) and larger.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.extras import how_to_install
from jaxquant.graph.primitives import Channels
from jaxquant.plan.grid import SMALLEST_SCALE
from jaxquant.recover.shift import shift_of, unit_of

STEPS = 500
SECONDS = 60.0  # a site; what is learned by then is hardened
BATCH = 256  # positions a step
RATE = 3e-2
WEIGHT = 3.0  # λ
WARM_UP = 0.2  # of the steps, without the second term
_CHUNK = 50  # steps between looks at the clock
_BETA = (20.0, 2.0)
_STRETCH = (-0.1, 1.1)


class Problem(NamedTuple):
    """One site as a product of matrices; see `jaxquant.recover.product` for the letters.

    Attributes:
      inputs: float32 [R, G, K], integers.
      wanted: float32 [R, C], the float model's outputs before the activation.
      down: float32 [G, K, C/G], the integers below the weights.
      fraction: float32 likewise, in [0, 1]: how far each weight is above; 0 and 1 stay as they are.
      nearest: bool likewise, True where nearest rounding goes up.
      multiplier, bias: float32 [C].
      activation: what follows, elementwise.
      correct: take the mean error of each output channel away.
    """

    inputs: np.ndarray
    wanted: np.ndarray
    down: np.ndarray
    fraction: np.ndarray
    nearest: np.ndarray
    multiplier: np.ndarray
    bias: np.ndarray
    activation: Callable[[jax.Array], jax.Array]
    correct: bool


class Learned(NamedTuple):
    """What `learn` found.

    Attributes:
      up: bool [G, K, C/G], which weights are rounded up.
      nearest: the held-out error with nearest rounding.
      learned: that with `up`, or what it would have been where nearest rounding stayed.
    """

    up: np.ndarray
    nearest: float
    learned: float


def check_optax() -> None:
    """Raise ImportError where optax is not installed."""
    try:
        import optax  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "recover=('adaround', ...) learns with optax, which is not installed: "
            f"{how_to_install('recover')}"
        ) from error


def learn(problem: Problem, steps: int = STEPS, seconds: float = SECONDS) -> Learned:
    """Learn the rounding of one site.

    Args:
      problem: the site.
      steps, seconds: when to stop.
    """
    train, test = _split(problem)
    nearest = problem.nearest
    start, base = errors(train, nearest), errors(test, nearest)
    # A weight on a step has nothing to decide, and a site without error nothing to gain.
    free = (problem.fraction > 0) & (problem.fraction < 1)
    size = math.sqrt(start / len(train.inputs))  # of an error: the losses are in units of it
    if size < SMALLEST_SCALE or not free.any():
        return Learned(nearest, base, base)
    # Learned with the bias as it is corrected behind nearest rounding, and held still: what the
    # learned rounding does to the mean is taken away behind it.
    bias = train.bias + shift(train, nearest)
    run = _runner(problem.activation)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = _start(problem)
    arrays = (train.inputs, train.wanted, problem.down, free, problem.multiplier, bias)
    data = tuple(map(jnp.asarray, arrays))
    scale = jnp.float32(1 / size)
    key, began = jax.random.key(0), time.monotonic()
    # In chunks, so that the limit in seconds is looked at now and then.
    for first in range(0, steps, _CHUNK):
        count = min(_CHUNK, steps - first)
        progress = jnp.asarray((first + np.arange(count)) / steps, jnp.float32)
        keys = jax.random.split(jax.random.fold_in(key, first), count)
        with jax.numpy_dtype_promotion("standard"):
            state = jax.block_until_ready(run(state, data, scale, progress, keys))
        if time.monotonic() - began > seconds:
            break
    # Rows that were not learned from decide: rounding to nearest stays where it is no worse.
    up = np.where(free, np.asarray(state[0]) >= 0, nearest)
    found = errors(test, up, shift(train, up))
    base = errors(test, nearest, shift(train, nearest))
    return Learned(up if found < base else nearest, base, found)


def shift(problem: Problem, up: np.ndarray) -> np.ndarray:
    """[C], what takes away the mean error of each channel with a rounding; 0 if not asked for."""
    if not problem.correct:
        return np.zeros_like(problem.bias)
    y, wanted = _outputs(problem, up), jnp.asarray(problem.wanted)
    gain = problem.activation(wanted) - problem.activation(y)
    channels = Channels((y.shape[1],), (1,))
    unit = unit_of(wanted, y)
    return np.asarray(shift_of((wanted - y) / unit, gain / unit, channels, unit).mean())


def errors(problem: Problem, up: np.ndarray, off: np.ndarray | None = None) -> float:
    """Σ (f(y) - f(ŷ))² over the positions and channels with a rounding and an added bias."""
    y = _outputs(problem, up)
    y = y + (jnp.float32(0) if off is None else jnp.asarray(off))
    difference = problem.activation(jnp.asarray(problem.wanted)) - problem.activation(y)
    return float(np.sum(np.square(np.asarray(difference, np.float64))))


def _outputs(problem: Problem, up: np.ndarray) -> jax.Array:
    weight = problem.down + up.astype(np.float32)
    return _product(jnp.asarray(problem.inputs), jnp.asarray(weight)) * jnp.asarray(
        problem.multiplier
    ) + jnp.asarray(problem.bias)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    y = jnp.einsum("rgk,gko->rgo", x, weight, precision="highest")
    return y.reshape(len(x), -1)


def _split(problem: Problem) -> tuple[Problem, Problem]:
    """The positions that are learned from, and those held out."""
    cut = len(problem.inputs) - max(len(problem.inputs) // 4, 1)
    return tuple(
        problem._replace(inputs=problem.inputs[rows], wanted=problem.wanted[rows])
        for rows in (slice(None, cut), slice(cut, None))
    )  # type: ignore[return-value]


def _start(problem: Problem) -> tuple[jax.Array, Any]:
    """v where h(v) is the fraction of the weight, and the optimizer's state."""
    import optax

    low, high = _STRETCH
    # Within [1/12, 11/12], since h is stretched beyond [0, 1]: a sigmoid has an inverse there.
    inner = (problem.fraction.astype(np.float64) - low) / (high - low)
    v = jnp.asarray(np.log(inner / (1 - inner)), jnp.float32)
    return v, optax.adam(RATE).init(v)


def soft(v: jax.Array) -> jax.Array:
    """h(v), the rectified sigmoid."""
    low, high = _STRETCH
    return jnp.clip(jax.nn.sigmoid(v) * jnp.float32(high - low) + jnp.float32(low), 0, 1)


@functools.lru_cache(maxsize=64)
def _runner(activation: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    """Some steps in one compiled call: (state, data, scale, progress [S], keys [S]) -> state."""
    import optax

    optimizer = optax.adam(RATE)

    def loss(v: jax.Array, data: Any, rows: jax.Array, scale: jax.Array, at: jax.Array) -> Any:
        inputs, wanted, down, free, multiplier, bias = data
        h = soft(v)
        y = _product(inputs[rows], down + jnp.where(free, h, (v >= 0).astype(v.dtype)))
        off = activation(wanted[rows]) - activation(y * multiplier + bias)
        error = jnp.sum((off * scale) ** 2) / jnp.float32(len(rows))
        # The loss of AdaRound (equation 25): after the warm-up the regularizer is on, and its
        # exponent falls, which pushes each rounding to 0 or 1.
        late = (at - jnp.float32(WARM_UP)) / jnp.float32(1 - WARM_UP)
        beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - jnp.clip(late, 0, 1))
        away = jnp.clip(jnp.abs(2 * h - 1), 1e-6, 1)
        undecided = jnp.sum(jnp.where(free, 1 - away**beta, 0)) / jnp.sum(free).astype(v.dtype)
        return error + jnp.where(late > 0, jnp.float32(WEIGHT) * undecided, 0)

    @jax.jit
    def run(state: Any, data: Any, scale: jax.Array, progress: jax.Array, keys: jax.Array) -> Any:
        def step(state: Any, x: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            v, moments = state
            at, key = x
            rows = jax.random.randint(key, (min(BATCH, len(data[0])),), 0, len(data[0]))
            gradient = jax.grad(loss)(v, data, rows, scale, at)
            update, moments = optimizer.update(gradient, moments, v)
            return (optax.apply_updates(v, update), moments), None

        return jax.lax.scan(step, state, (progress, keys))[0]

    return run
