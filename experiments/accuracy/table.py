"""The accuracy table as a whole: what to measure, on which resources, and the files it ends in."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from experiments import zoo
from experiments.accuracy import markdown, methods, parallel, rows
from experiments.accuracy.measure import measure
from experiments.accuracy.methods import Method
from experiments.accuracy.rows import Network, Store
from experiments.errors import ExperimentError
from experiments.files import write_text
from experiments.settings import model_input
from experiments.weights.tree import template

# Peak memory of a process: that of the programs and the library, so many copies of the parameters
# (float32, int8, constants that were folded), and activations as so many times the images.
BASE_BYTES = 1.0e9
PARAMETER_COPIES = 6
ACTIVATIONS_PER_IMAGE = 80


class Plan(NamedTuple):
    """A run of the table.

    Attributes:
      networks: in the order of the table.
      methods: likewise.
      missing: for each network that has weights, the methods whose rows are not finished.
      slots: the cores of each process that may run beside the others.
      memory: bytes for all of them; None for no bound.
      workdir: where finished rows are kept.
    """

    networks: Sequence[Network]
    methods: Sequence[Method]
    missing: dict[str, list[Method]]
    slots: Sequence[tuple[int, ...]]
    memory: int | None
    workdir: Path


def make_plan(
    config: ConfigDict, names: Sequence[str], chosen: Sequence[Method], workdir: Path
) -> Plan:
    """What a run measures, and how many processes at once.

    Args:
      config: as `configs/accuracy_table.py`.
      names: networks of the zoo; of none, those of the config.
      chosen: the methods.
      workdir: where finished rows are kept.

    Raises:
      ExperimentError: given weights or images are not there, or a network or an option of a method
        is not known.
    """
    for name in names:
        zoo.find(name)
    for method in chosen:
        methods.check(method)
    backend, store = backend_of_processes(), Store(workdir)
    networks = [rows.network(config, name, backend) for name in names or config.models]
    missing = {
        network.name: [m for m in chosen if store.row(network.row_key(m)) is None]
        for network in networks
        if network.key is not None
    }
    missing = {name: wanted for name, wanted in missing.items() if wanted}
    # An accelerator is not shared.
    most = parallel.usable_cores() if backend == "cpu" else 1
    processes = min(config.processes or most, len(missing)) or 1
    memory = int(config.memory_gigabytes * 1e9) or parallel.available_memory()
    return Plan(networks, chosen, missing, parallel.share_cores(processes), memory, workdir)


def describe(plan: Plan) -> str:
    """What a run would do."""
    lines = []
    for network in plan.networks:
        if network.key is None:
            lines.append(f"{network.name:24}{markdown.no_weights(network.name)}")
            continue
        wanted = plan.missing.get(network.name, [])
        names = [f"{m.name} ({'to run' if m in wanted else 'finished'})" for m in plan.methods]
        gigabytes = expected_memory(network) / 1e9
        lines.append(f"{network.name:24}{', '.join(names)}; about {gigabytes:.1f} GB")
    bound = "no bound on memory" if plan.memory is None else f"{plan.memory / 1e9:.1f} GB of memory"
    cores = " and ".join(str(len(slot) or "all") for slot in plan.slots)
    return "\n".join([*lines, f"{len(plan.slots)} at once, on {cores} cores, {bound}"])


def run(
    plan: Plan, worker: Callable[[Network, Sequence[Method], str], None] = measure
) -> dict[str, str]:
    """Measures what is missing; returns the networks that failed, and why."""
    jobs = [
        parallel.Job(
            network.name,
            worker,
            (network, plan.missing[network.name], str(plan.workdir)),
            expected_memory(network),
        )
        for network in plan.networks
        if network.name in plan.missing
    ]
    return parallel.run_all(jobs, plan.slots, plan.memory, (ExperimentError,))


def finish(plan: Plan, failures: dict[str, str], table_file: Path, rows_file: Path) -> str:
    """Writes the table and, one JSON a line, its rows; returns the table.

    A network without weights and one that failed have a row that says so.
    """
    store = Store(plan.workdir)
    finished: dict[str, list[dict[str, Any]]] = {}
    notes = {}
    for network in plan.networks:
        if network.key is None:
            notes[network.name] = markdown.no_weights(network.name)
            continue
        found = (store.row(network.row_key(method)) for method in plan.methods)
        finished[network.name] = [row for row in found if row is not None]
        if network.name in failures:
            notes[network.name] = "failed: " + failures[network.name].strip().splitlines()[-1]
    names = [network.name for network in plan.networks]
    text = markdown.render(names, finished, notes)
    lines = [row for name in names for row in finished.get(name, ())]
    lines += [{"model": name, "note": note} for name, note in notes.items()]
    write_text(rows_file, "".join(json.dumps(line) + "\n" for line in lines))
    markdown.write(table_file, text)
    return text


def expected_memory(network: Network) -> int:
    """The bytes that the process of a network is expected to need."""
    module = zoo.build(network.name, network.config.num_classes)
    size = model_input(network.config).size
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
