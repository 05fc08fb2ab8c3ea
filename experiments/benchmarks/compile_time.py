"""Times tracing and compiling the int8 model against the float32 one.

    python -m experiments.benchmarks.compile_time --networks=resnet50,mobilenet_v2

Every round clears JAX's caches and compiles each program anew.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.arguments import network_parser
from experiments.benchmarks.systems import Case

NETWORKS = ("resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0", "googlenet")


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """To trace and lower, to compile."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def main(networks: list[str], batch: int, rounds: int, weights: dict[str, str]) -> None:
    print(f"jax {jax.__version__}, {jax.default_backend()}, batch {batch}, {rounds} rounds")
    print(f"{'':20}{'':20}{'trace s':>9}{'compile s':>11}{'ratio':>8}")
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(network, batch, Path(folder), weights.get(network))
            qparams, qapply = case.int8()
            # A fresh function each, so that nothing that a run keeps is reused.
            programs: dict[str, tuple[Any, Any]] = {
                "float32": (case.module.apply, case.variables),
                "int8, XLA": (qapply.with_backend("xla"), qparams),
            }
            if qapply.backend.name == "native":
                programs["int8, native"] = (qapply, qapply.prepare(qparams))
            runs: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
            for _ in range(rounds):
                for name, (function, arrays) in programs.items():
                    runs[name].append(seconds(function, arrays, case.x))
        totals = {name: statistics.median(map(sum, times)) for name, times in runs.items()}
        for name, times in runs.items():
            trace, compiling = (statistics.median(part) for part in zip(*times, strict=True))
            print(
                f"{network:20}{name:20}{trace:9.2f}{compiling:11.2f}"
                f"{totals[name] / totals['float32']:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    parser = network_parser(__doc__, NETWORKS, rounds=3)
    parser.add_argument("--batch", type=int, default=8)
    given = parser.parse_args()
    main(given.networks, given.batch, given.rounds, dict(given.weights))
