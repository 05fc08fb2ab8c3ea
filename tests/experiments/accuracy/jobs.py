"""What the tests let processes of their own do; a spawned process imports it by name."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import zoo
from experiments.accuracy.measure import measure
from experiments.accuracy.methods import Method
from experiments.accuracy.rows import Network, Store
from experiments.preprocessing import Preprocessing
from experiments.weights.tree import OUR_NAMES


class Tiny(nn.Module):
    """Images [B, 8, 8, 3] -> logits [B, 7]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), dtype=jnp.float32, name="conv")(x))
        return nn.Dense(7, dtype=jnp.float32, name="classifier")(x.mean((1, 2)))


INPUT = Preprocessing(8, mean=(127.0,) * 3, std=(128.0,) * 3, resize=8)
TINY = {name: zoo.Entry(Tiny, INPUT, (OUR_NAMES,)) for name in ("tiny_a", "tiny_b", "tiny_c")}


def measure_tiny(network: Network, methods: Sequence[Method], workdir: str) -> None:
    zoo.MODELS.update(TINY)
    measure(network, methods, workdir)


def die_after_the_first_row(network: Network, methods: Sequence[Method], workdir: str) -> None:
    save_row = Store.save_row

    def save_and_die(*arguments) -> None:
        save_row(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    Store.save_row = save_and_die
    measure_tiny(network, methods, workdir)


def note_time(folder: str, name: str, seconds: float) -> None:
    """Leaves a file with the cores, the start and the end."""
    started = time.time()
    time.sleep(seconds)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    Path(folder, name).write_text(f"{cores} {started} {time.time()}")


def meet(folder: str, name: str, other: str) -> None:
    """Ends once the other job has begun too."""
    Path(folder, name).touch()
    for _ in range(600):
        if Path(folder, other).exists():
            return
        time.sleep(0.1)
    raise TimeoutError(f"{other} did not run beside {name}")


def fail(error: Exception) -> None:
    raise error


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
