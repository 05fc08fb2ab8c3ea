"""Observations of several processes (`jax.distributed`), each of its own data, as one."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.observations import Observations, Origin, TensorStats, merge
from jaxquant.jax_shim import processes


def reduce_processes(observations: Observations) -> Observations:
    """What all processes saw together; every process gets the same bits.

    The histograms are counts, so the result is that of one process on all the data.  The examples
    are those of process 0.  With one process the observations are returned as they are.

    Raises:
      RuntimeError: a process does not come to the end of its sweep; the message says which.
      ValueError: the processes calibrate different models, or an observer of its own keeps states,
        which nothing tells how to merge.
    """
    if jax.process_count() == 1:
        return observations
    if observations.observer is not None:
        raise ValueError(
            "an algo that keeps statistics of its own ('avg', an Observer with its own update) "
            "cannot be reduced across processes; calibrate with another one, or in one process"
        )
    # A process that failed would leave the others waiting for its arrays.
    _meet("end its sweep")
    names = list(observations.tensors)
    _check_same(names)
    stats = [observations.tensors[name] for name in names]
    gathered = _gather(_encode(stats))
    # Every process joins all parts itself, in one order, so that all have the same bits.
    parts = [_decode({k: v[p] for k, v in gathered.items()}) for p in range(jax.process_count())]
    seen = _gather({"seen": np.array([observations.batches, observations.samples], np.int32)})
    batches, samples = (int(x) for x in seen["seen"].sum(axis=0, dtype=np.int64))
    return dataclasses.replace(
        observations,
        tensors={name: merge([part[k] for part in parts]) for k, name in enumerate(names)},
        batches=batches,
        samples=samples,
        examples=_examples_of_first(observations.examples),
        origin=_origin_of_first(observations.origin),
    )


def _encode(stats: Sequence[TensorStats]) -> dict[str, np.ndarray]:
    """Statistics as arrays without 64-bit integers, which JAX does not move by default."""
    # 64-bit counts travel as two words.
    counts = np.stack([s.counts for s in stats]).astype(np.uint64)
    totals = np.array([s.count for s in stats], np.uint64)
    return {
        **_words("counts", counts),
        **_words("total", totals),
        "exponent": np.array([math.frexp(s.bin_width)[1] - 1 for s in stats], np.int32),
        "ends": np.array([(s.min, s.max, s.abs_max) for s in stats], np.float32),
    }


def _decode(arrays: dict[str, np.ndarray]) -> list[TensorStats]:
    counts, totals = _whole(arrays, "counts"), _whole(arrays, "total")
    # Counts travel as halves that fit in 32 bits; here they are whole again.
    return [
        TensorStats(
            counts=counts[k],
            bin_width=math.ldexp(1.0, int(arrays["exponent"][k])),
            min=float(arrays["ends"][k, 0]),
            max=float(arrays["ends"][k, 1]),
            abs_max=float(arrays["ends"][k, 2]),
            count=int(totals[k]),
        )
        for k in range(len(totals))
    ]


def _words(name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    # JAX narrows 64-bit integers unless it is told not to.
    low, high = values & np.uint64(0xFFFFFFFF), values >> np.uint64(32)
    return {f"{name}_low": low.astype(np.uint32), f"{name}_high": high.astype(np.uint32)}


def _whole(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    high = arrays[f"{name}_high"].astype(np.uint64) << np.uint64(32)
    return high + arrays[f"{name}_low"].astype(np.uint64)


def _check_same(names: Sequence[str]) -> None:
    differing = _differing("\n".join(names))
    if differing:
        raise ValueError(
            f"the processes calibrate different models: {_spell(differing)} observe other tensors "
            "than process 0. Every process gives the same params and apply_fn, and its own part of "
            "the data in batches of any size"
        )


def check_alike(params: Mapping[str, str], complete: bool) -> None:
    """Raise where the processes begin with different things; nothing with one process.

    Args:
      params: path -> digest of each parameter.
      complete: whether this process has a calibration file of a sweep that is done.

    Raises:
      RuntimeError: a process does not come.
      ValueError: the parameters differ, or some processes have a complete file and some have none;
        the message says which.
    """
    if jax.process_count() == 1:
        return
    _meet("begin to calibrate")
    # A complete file skips the sweep, so that all processes skip it or none.
    done = _gather({"done": np.array([complete], np.int32)})["done"][:, 0]
    if done.any() and not done.all():
        raise ValueError(
            f"the calibration files of {_spell(np.flatnonzero(done))} are complete, those of "
            f"{_spell(np.flatnonzero(done == 0))} are missing or not complete. A complete file "
            "holds what all processes saw: copy it to every process, or delete it to calibrate anew"
        )
    if others := _differing("\n".join(params)):
        raise ValueError(
            f"the processes have different parameters: those of {_spell(others)} have other paths "
            "than those of process 0. Every process gives the same params"
        )
    # A path and its value each.
    digests = [_digest(text) for text in params.values()]
    # Digests, not arrays: parameters may be large, and spread over the processes' devices.
    every = _gather({"digests": np.stack(digests)})["digests"]  # [processes, parameters, bytes]
    unlike = (every != every[0]).any(axis=2)
    if unlike.any():
        first = int(np.flatnonzero(unlike.any(axis=0))[0])
        raise ValueError(
            f"the processes have different parameters: params[{list(params)[first]!r}] of "
            f"{_spell(np.flatnonzero(unlike[:, first]))} is not that of process 0. Every process "
            "gives the same params: load them from one file, or seed their initialization alike"
        )


def _differing(text: str) -> list[int]:
    """The processes whose text is not that of process 0."""
    every = _gather({"digest": _digest(text)})["digest"]
    return [int(k) for k in np.flatnonzero((every != every[0]).any(axis=1))]


def _digest(text: str) -> np.ndarray:
    # One byte an int32: a gather of bytes is not what every backend has.
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.int32)


def _spell(processes: Iterable[int]) -> str:
    found = [str(k) for k in processes]
    return f"process{'es' if len(found) > 1 else ''} {', '.join(found)}"


_PATIENCE = 600.0  # seconds in which every process has to come to a meeting
_meetings = itertools.count()


def _meet(what: str) -> None:
    """Wait for all processes before they exchange anything.

    What moves arrays between them says of one that is lost no more than "context initialization
    failed".
    """
    name = f"jaxquant/{next(_meetings)}"
    missing = processes.missing_processes(name, _PATIENCE)
    if missing:
        raise RuntimeError(
            f"{_spell(missing)} of {jax.process_count()} did not {what} within {_PATIENCE:g} "
            "seconds: it has ended, or still reads its data; its own output says why. All "
            "processes call calibrate or quant_post, as often as each other"
        )


def _gather(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each array with a leading axis of the processes."""
    from jax.experimental import multihost_utils

    gathered: dict[str, Any] = multihost_utils.process_allgather(arrays)
    return {name: np.asarray(value) for name, value in gathered.items()}


def _origin_of_first(origin: Origin | None) -> Origin | None:
    """The origin with process 0's model, which is traced in the shapes of its first batch."""
    if origin is None:
        return None
    digest = np.frombuffer(bytes.fromhex(origin.model), np.uint8).astype(np.int32)
    first = _gather({"model": digest})["model"][0]
    return dataclasses.replace(origin, model=bytes(first.astype(np.uint8)).hex())


def _examples_of_first(examples: tuple[tuple[Any, ...], ...]) -> tuple[tuple[Any, ...], ...]:
    """Process 0's, in whose shapes and number the others' may differ."""
    from jax.experimental import multihost_utils

    # Process 0's first example tells the structure; the others' may be of another shape.
    leaves, tree = jax.tree.flatten(examples[:1])
    count = _gather({"n": np.array([len(examples)], np.int32)})["n"][0, 0]
    found = []
    for number in range(int(count)):
        # A process with fewer examples sends its first one's shapes, which are filled anyway.
        own = jax.tree.leaves(examples[number]) if number < len(examples) else leaves
        # A broadcast needs the same shapes everywhere: the others send zeros of process 0's.
        shapes = _gather({str(k): np.array(np.shape(x), np.int32) for k, x in enumerate(own)})
        wanted = [tuple(shapes[str(k)][0]) for k in range(len(leaves))]
        filled = [
            np.asarray(x) if np.shape(x) == shape else np.zeros(shape, np.asarray(x).dtype)
            for x, shape in zip(own, wanted, strict=True)
        ]
        received = multihost_utils.broadcast_one_to_all(filled)
        found.append(jax.tree.unflatten(tree, [np.asarray(x) for x in received])[0])
    return tuple(found)
