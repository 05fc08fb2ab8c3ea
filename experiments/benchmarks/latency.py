r"""Times whole networks by jaxquant, JAX, ONNX Runtime, OpenVINO, LiteRT and Qwix.

    python -m experiments.benchmarks.latency --networks=resnet50,mobilenet_v1 --batches=1,8,32

Every network and batch size has a process of its own, in which the systems take turns; a system
that is not installed is left out, and said so.  Prints medians, their quartiles and the ratios to
`jax-f32`; results go to `--out` as JSON lines, and from there to a picture with `--plot`.
`--cpu-time` counts what the process computes, which other programs disturb less: on one core, by
`taskset -c 0`, that is the latency there.  `--memory` measures the peak memory of a process that
runs one system alone instead.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.arguments import network_parser
from experiments.benchmarks.interleave import times_in_turn
from experiments.benchmarks.systems import SYSTEMS, Case

NETWORKS = ("resnet50", "mobilenet_v1", "mobilenet_v2", "efficientnet_lite0")
BASE = "jax-f32"


def measure(
    network: str,
    batch: int,
    systems: list[str],
    rounds: int,
    weights: str | None,
    clock: Callable[[], float] = time.perf_counter,
) -> Any:
    """The seconds of every round, by system; a text instead where a system cannot run."""
    programs, missing = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(network, batch, Path(folder), weights)
        for name in systems:
            try:
                programs[name] = SYSTEMS[name](case)
                jax.block_until_ready(programs[name]())
            except Exception as error:  # whatever another system raises
                programs.pop(name, None)
                missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return times_in_turn(programs, rounds, clock) | missing


def measure_memory(network: str, batch: int, system: str, weights: str | None) -> int | None:
    """The peak bytes of this process while the system runs, once it is compiled and warm."""
    with tempfile.TemporaryDirectory() as folder:
        program = SYSTEMS[system](Case(network, batch, Path(folder), weights))
        jax.block_until_ready(program())
        try:
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        except OSError:
            return None
        for _ in range(3):
            jax.block_until_ready(program())
        status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def in_own_process(arguments: list[str]) -> Any:
    """What another process of this program measures, as its last line says."""
    command = [sys.executable, "-m", "experiments.benchmarks.latency", "--worker", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def record(network: str, batch: int, system: str, times: Any, base: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"network": network, "batch": batch, "system": system}
    if isinstance(times, str):
        return found | {"error": times}
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    median = statistics.median(times)
    return found | {
        "median_ms": 1e3 * median,
        "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]],
        "rounds": len(times),
        "ratio": median / base if base else None,
    }


def show(records: list[dict[str, Any]]) -> None:
    first = records[0]
    print(f"\n{first['network']}, batch {first['batch']}")
    print(f"{'':28}{'ms':>9}{'quartiles':>18}{'ratio':>8}")
    for each in records:
        if "error" in each:
            print(f"{each['system']:28}  {each['error']}")
            continue
        low, high = each["quartiles_ms"]
        ratio = f"{each['ratio']:8.3f}" if each["ratio"] else ""
        print(
            f"{each['system']:28}{each['median_ms']:9.2f}{low:9.2f}-{high:<8.2f}{ratio}", flush=True
        )


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios to `BASE`, a panel for each network and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [r for r in records if r.get("ratio")]
    panels = sorted({(r["network"], r["batch"]) for r in timed})
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(7, 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        rows = [r for r in timed if (r["network"], r["batch"]) == panel][::-1]
        colors = ["tab:orange" if "jaxquant" in r["system"] else "tab:gray" for r in rows]
        bars = axis.barh([r["system"] for r in rows], [r["ratio"] for r in rows], color=colors)
        axis.bar_label(bars, [f"{r['median_ms']:.1f} ms" for r in rows], padding=3, fontsize=7)
        axis.set_xscale("log")
        axis.set_title(f"{panel[0]}, batch {panel[1]}: time / {BASE}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
    figure.savefig(path, dpi=120)


def main(given: argparse.Namespace) -> None:
    systems = given.systems.split(",") if given.systems else list(SYSTEMS)
    weights = dict(given.weights)
    records: list[dict[str, Any]] = []
    print(f"jax {jax.__version__}, {jax.default_backend()}, {given.rounds} rounds")
    for network in given.networks:
        extra = ["--weights", f"{network}={weights[network]}"] if network in weights else []
        for batch in map(int, given.batches.split(",")):
            shared = ["--networks", network, "--batches", str(batch), *extra]
            if given.memory:
                for system in systems:
                    peak = in_own_process([*shared, "--systems", system, "--memory"])
                    records.append({"network": network, "batch": batch, "system": system,
                                    "peak_bytes": peak})  # fmt: skip
                    print(f"{network}, batch {batch}, {system}: "
                          f"{peak / 2**20:.0f} MiB" if peak else "unknown", flush=True)  # fmt: skip
                continue
            clock = ["--cpu-time"] if given.cpu_time else []
            found = in_own_process(
                [*shared, *clock, "--systems", ",".join(systems), "--rounds", str(given.rounds)]
            )
            base = found.get(BASE)
            base = statistics.median(base) if isinstance(base, list) else None
            of_case = [record(network, batch, s, found[s], base) for s in systems]
            show(of_case)
            records += of_case
            if given.out:
                given.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    if given.out:
        given.out.write_text("".join(json.dumps(r) + "\n" for r in records))
    if given.plot:
        plot(records, given.plot)


def worker(given: argparse.Namespace) -> None:
    (network,), batch, systems = given.networks, int(given.batches), given.systems.split(",")
    weights = dict(given.weights).get(network)
    if given.memory:
        print(json.dumps(measure_memory(network, batch, systems[0], weights)))
    else:
        clock = time.process_time if given.cpu_time else time.perf_counter
        print(json.dumps(measure(network, batch, systems, given.rounds, weights, clock)))


if __name__ == "__main__":
    parser = network_parser(__doc__, NETWORKS, rounds=15)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--systems", help="separated by commas; all by default", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="of all threads, not by the clock")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    worker(arguments) if arguments.worker else main(arguments)
