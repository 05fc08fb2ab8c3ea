"""Time several programs in turn within each round, so that their ratios hold on a busy machine."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def times_in_turn(
    programs: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each program in each of `rounds`, each run once beforehand.

    Each round has an order of its own: what one runtime leaves behind, threads that still look for
    work and caches, meets another program each time.
    """
    for program in programs.values():
        jax.block_until_ready(program())
    runs: dict[str, list[float]] = {name: [] for name in programs}
    shuffled, names = random.Random(0), list(programs)
    for _ in range(rounds):
        shuffled.shuffle(names)
        for name in names:
            start = clock()
            jax.block_until_ready(programs[name]())
            runs[name].append(clock() - start)
    return runs


def time_in_turn(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The median seconds of each program over `rounds`, each run once beforehand."""
    runs = times_in_turn(programs, rounds)
    return {name: statistics.median(times) for name, times in runs.items()}


def print_table(title: str, medians: Mapping[str, float]) -> None:
    """Medians in milliseconds and their ratios to the first."""
    base = next(iter(medians.values()))
    print(f"{title}, {jax.devices()[0].platform}, jax {jax.__version__}")
    print(f"{'':32}{'ms':>10}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:32}{median * 1e3:10.2f}{median / base:8.2f}", flush=True)
