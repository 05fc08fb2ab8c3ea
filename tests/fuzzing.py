"""Mutated files, read by a process of its own with limits of memory and time.

    python -m tests.fuzzing 0 3000 models=BASE_FILE pth=OTHER_BASE_FILE

A case is known by its number: the worker that dies of one says which, and the next goes on behind
it.  Every case ends in one of these words:

    refused   the reader's own error, which names the file
    same      what was read is what was saved
    other     something else was read; from a file with right checksums that may be
    changed   something else was read, where checksums should have told
    ERROR     another error than the reader's own
    DIED      a crash, the time ran out, or memory that a limit did not give ended the process
"""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxquant
from experiments.weights.torch_pth import read_pth
from experiments.weights.tree import WeightsError
from jaxquant.files.errors import FileError
from tests import mutations

GOOD = frozenset({"refused", "same", "other"})
SECONDS = 30  # for one case
MEMORY = 2**30  # beside what the worker has when it begins


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
      mutate: (bytes of a good file, source of randomness) -> other bytes.
      read: path -> what is compared.
      error: what a refusal is.
      sealed: True where a mutation cannot compute the checksums, so that what loads is the same.
    """

    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], Any]
    error: type[Exception]
    sealed: bool


def _model(path: Path) -> Any:
    qparams, qapply = jaxquant.load_quantized_model(path)
    return qparams, qapply.plan, str(qapply.report())


def _called(path: Path) -> Any:
    """A model that is called too: what it computes may differ, and may fail with an error."""
    qparams, qapply = jaxquant.load_quantized_model(path)
    inputs = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), qapply.inputs)
    try:
        return jax.device_get(qapply(qparams, *inputs))
    except Exception as error:  # of XLA, by what the graph asks for
        return repr(error)


def _observations(path: Path) -> Any:
    found = jaxquant.load_observations(path)
    return (
        {name: dataclasses.astuple(stats) for name, stats in found.tensors.items()},
        found.batches,
        found.samples,
        found.examples,
    )


KINDS: Mapping[str, Kind] = {
    "models": Kind(mutations.damaged, _model, FileError, sealed=True),
    "tampered": Kind(mutations.tampered_model, _model, FileError, sealed=False),
    "graphs": Kind(mutations.tampered_graph, _called, FileError, sealed=False),
    "observations": Kind(mutations.damaged, _observations, FileError, sealed=True),
    "records": Kind(mutations.tampered_record, _observations, FileError, sealed=False),
    "pth": Kind(mutations.checkpoint, read_pth, WeightsError, sealed=False),
    "stream": Kind(mutations.checkpoint, read_pth, WeightsError, sealed=False),
}


def survey(bases: Mapping[str, Path], count: int) -> dict[str, Counter[str]]:
    """How many cases end how, by kind; what went wrong is printed, with the numbers of the cases.

    Args:
      bases: a good file of every kind.
      count: of the cases of each.
    """
    found: dict[str, Counter[str]] = {kind: Counter() for kind in bases}
    given = [f"{kind}={path}" for kind, path in bases.items()]
    start, stop = 0, count * len(bases)
    while start < stop:
        command = [sys.executable, "-m", "tests.fuzzing", str(start), str(stop), *given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(x) for x in done.stdout.splitlines() if x.startswith("[")]
        if not lines:
            raise RuntimeError(f"the worker did not start: {done.stderr[-2000:]}")
        if lines[-1][1] == "begun":  # it died of that case
            number = lines[-1][0]
            lines.append([number, "DIED", f"{done.returncode} {done.stderr[-500:]}"])
        for number, word, text in lines:
            kind = list(bases)[number % len(bases)]
            if word != "begun":
                found[kind][word] += 1
            if word not in GOOD | {"begun"}:
                print(f"{kind} {number}: {word} {text}")
        start = lines[-1][0] + 1
    return found


def work(bases: Mapping[str, Path], start: int, stop: int) -> None:
    """Read the cases from `start` to `stop`, the kinds in turn, and tell of each how it ends."""
    contents = {name: base.read_bytes() for name, base in bases.items()}
    good = {name: KINDS[name].read(base) for name, base in bases.items()}
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        for number in range(start, stop):
            name = list(bases)[number % len(bases)]
            _say(number, "begun")
            draw = random.Random(f"{name} {number}")
            path.write_bytes(KINDS[name].mutate(contents[name], draw))
            signal.alarm(SECONDS)  # unhandled, it ends the process wherever that is
            word, text = _outcome(KINDS[name], path, good[name])
            signal.alarm(0)
            _say(number, word, text)


def _outcome(kind: Kind, path: Path, good: Any) -> tuple[str, str]:
    try:
        found = kind.read(path)
    except kind.error as error:
        return ("refused", "") if str(path) in str(error) else ("ERROR", f"{error!r} names no file")
    except BaseException as error:
        return "ERROR", repr(error)[:300]
    if _same(found, good):
        return "same", ""
    return ("changed" if kind.sealed else "other"), ""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    if hasattr(a, "dtype") and hasattr(b, "dtype"):
        x, y = np.asarray(a), np.asarray(b)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    return type(a) is type(b) and bool(a == b)


def _say(number: int, word: str, text: str = "") -> None:
    print(json.dumps([number, word, text]), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    _, start, stop, *given = sys.argv
    pairs = (item.split("=", 1) for item in given)
    work({kind: Path(path) for kind, path in pairs}, int(start), int(stop))
