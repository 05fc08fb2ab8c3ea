r"""Measures every network under every method, and writes the table of README.

  python experiments/accuracy_table.py --config.data_dir=IMAGES --config.calib_dir=OTHER_IMAGES

Networks run side by side, each in a process of its own, as cores and memory allow. What is finished
is kept in the work folder and not measured again, so an interrupted run goes on where it stopped; a
change of the library, of the weights or of the images makes new rows. A network without weights has
a row that says how to get them. The settings are those of `configs/accuracy_table.py`.
"""

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict, config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from a clone

from experiments import zoo
from experiments.accuracy import markdown, methods, parallel, rows
from experiments.accuracy.measure import measure
from experiments.accuracy.methods import Method
from experiments.accuracy.rows import Network, Store
from experiments.data import DataError
from experiments.files import write_text
from experiments.settings import model_input
from experiments.weights.fetch import FetchError
from experiments.weights.tree import WeightsError, template

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CONFIG = config_flags.DEFINE_config_file(
    "config", str(CONFIGS / "accuracy_table.py"), "Settings.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "runs/accuracy_table", "Where finished rows are kept.")
MODELS = flags.DEFINE_list("models", [], "Networks of the table; all of --config.models if empty.")
METHODS = flags.DEFINE_list("methods", [], "Methods of the table; all if empty.")
MARKDOWN = flags.DEFINE_string(
    "markdown", None, "Markdown file, such as README.md; by default table.md in the work folder."
)
JSONL = flags.DEFINE_string(
    "jsonl", None, "JSON-lines file; by default rows.jsonl in the work folder."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "List what would run, and run nothing.")

EXPECTED = (DataError, FetchError, WeightsError)

# Peak memory of a process: that of the programs and the library, so many copies of the parameters
# (float32, int8, constants that were folded), and activations as so many times the images.
BASE_BYTES = 1.0e9
PARAMETER_COPIES = 6
ACTIVATIONS_PER_IMAGE = 80


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; settings are given as --config.NAME=")
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)  # else: platforms tried
    jax.config.update("jax_platforms", "cpu")  # of this process, which only counts and waits
    workdir = Path(WORKDIR.value)
    table_file = Path(MARKDOWN.value or workdir / "table.md")
    rows_file = Path(JSONL.value or workdir / "rows.jsonl")
    try:
        markdown.around(table_file)  # before hours of work, not after
        chosen = methods.choose(METHODS.value)
        networks = plan(CONFIG.value, MODELS.value)
        missing = to_measure(networks, chosen, Store(workdir))
        slots, memory = resources(CONFIG.value, networks)
        if DRY_RUN.value:
            print(describe(networks, chosen, missing, slots, memory))
            return
    except (*EXPECTED, ValueError) as error:
        sys.exit(f"error: {error}")
    failures = run(networks, missing, workdir, slots, memory)
    table = finish(networks, chosen, failures, workdir, table_file, rows_file)
    print(f"\n{table}\nkept in {workdir}/")
    if failures:
        sys.exit(f"failed: {', '.join(failures)}; run again to go on with them")


def plan(config: ConfigDict, names: Sequence[str]) -> list[Network]:
    """The networks of the table, or those of them that are named, in the order of the table."""
    for name in names:
        zoo.find(name)
        if name not in config.models:
            raise ValueError(
                f"--models: {name} is not one of --config.models, {', '.join(config.models)}"
            )
    backend = backend_of_processes()
    return [
        rows.network(config, name, backend) for name in config.models if not names or name in names
    ]


def to_measure(
    networks: Sequence[Network], chosen: Sequence[Method], store: Store
) -> dict[str, list[Method]]:
    """For each network that has weights, the methods whose rows are not finished."""
    for method in chosen:
        methods.check(method)
    missing = {
        network.name: [m for m in chosen if store.row(network.row_key(m)) is None]
        for network in networks
        if network.key is not None
    }
    return {name: wanted for name, wanted in missing.items() if wanted}


def resources(
    config: ConfigDict, networks: Sequence[Network]
) -> tuple[list[tuple[int, ...]], int | None]:
    """The cores of each process that may run at once, and the memory for all of them."""
    memory = int(config.memory_gigabytes * 1e9) or parallel.available_memory()
    processes = config.processes
    if not processes:
        on_cpu = all(network.key["backend"] == "cpu" for network in networks if network.key)
        processes = parallel.usable_cores() if on_cpu else 1  # an accelerator is not shared
    measured = sum(network.key is not None for network in networks)
    return parallel.share_cores(max(1, min(processes, measured))), memory


def run(
    networks: Sequence[Network],
    missing: dict[str, list[Method]],
    workdir: Path,
    slots: Sequence[tuple[int, ...]],
    memory: int | None,
    worker: Callable[[Network, Sequence[Method], str], None] = measure,
) -> dict[str, str]:
    """Measures what is missing; returns why networks failed."""
    jobs = [
        parallel.Job(
            network.name,
            worker,
            (network, missing[network.name], str(workdir)),
            expected_memory(network),
        )
        for network in networks
        if network.name in missing
    ]
    return parallel.run_all(jobs, slots, memory, EXPECTED)


def finish(
    networks: Sequence[Network],
    chosen: Sequence[Method],
    failures: dict[str, str],
    workdir: Path,
    table_file: Path,
    rows_file: Path,
) -> str:
    """Writes the table and the finished rows; returns the table."""
    store = Store(workdir)
    finished: dict[str, list[dict[str, Any]]] = {}
    notes = {}
    for network in networks:
        if network.key is None:
            notes[network.name] = markdown.no_weights(network.name)
            continue
        found = (store.row(network.row_key(method)) for method in chosen)
        finished[network.name] = [row for row in found if row is not None]
        if network.name in failures:
            notes[network.name] = "failed: " + failures[network.name].strip().splitlines()[-1]
    names = [network.name for network in networks]
    table = markdown.render(names, finished, notes)
    lines = [json.dumps(row) + "\n" for name in names for row in finished.get(name, ())]
    lines += [json.dumps({"model": name, "note": note}) + "\n" for name, note in notes.items()]
    write_text(rows_file, "".join(lines))
    markdown.write(table_file, table)
    return table


def describe(
    networks: Sequence[Network],
    chosen: Sequence[Method],
    missing: dict[str, list[Method]],
    slots: Sequence[tuple[int, ...]],
    memory: int | None,
) -> str:
    """What a run would do."""
    lines = []
    for network in networks:
        if network.key is None:
            lines.append(f"{network.name:24}{markdown.no_weights(network.name)}")
            continue
        wanted = missing.get(network.name, [])
        names = [f"{m.name} ({'to run' if m in wanted else 'finished'})" for m in chosen]
        gigabytes = expected_memory(network) / 1e9
        lines.append(f"{network.name:24}{', '.join(names)}; about {gigabytes:.1f} GB")
    bound = "no bound on memory" if memory is None else f"{memory / 1e9:.1f} GB of memory"
    cores = " and ".join(str(len(slot) or "all") for slot in slots)
    return "\n".join([*lines, f"{len(slots)} at once, on {cores} cores, {bound}"])


def expected_memory(network: Network) -> int:
    """The bytes that the process of a network is expected to need."""
    module, size = zoo.find(network.name).module(), model_input(network.config).size
    leaves = jax.tree.leaves(template(module, size))
    parameters = sum(4 * math.prod(leaf.shape) for leaf in leaves)
    images = network.config.batch_size * size * size * 3 * 4
    return int(BASE_BYTES + PARAMETER_COPIES * parameters + ACTIVATIONS_PER_IMAGE * images)


def backend_of_processes() -> str:
    """Where JAX will run in another process; asked in one, so that this one holds no device."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise ValueError(f"JAX finds no device: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.split()[-1]


if __name__ == "__main__":
    app.run(main)
