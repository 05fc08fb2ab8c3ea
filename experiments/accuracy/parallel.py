"""Runs jobs in processes of their own, as many at once as cores and memory allow."""

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


class Job(NamedTuple):
    """One call, `run(*arguments)`, for a process of its own.

    Attributes:
      name: what to call it in messages.
      run: a function that can be pickled.
      arguments: likewise.
      memory: bytes that it is expected to need.
    """

    name: str
    run: Callable[..., None]
    arguments: tuple[Any, ...]
    memory: int


class _Running(NamedTuple):
    job: Job
    process: Any
    outcome: Connection
    cores: tuple[int, ...]


def run_all(
    jobs: Sequence[Job],
    slots: Sequence[tuple[int, ...]],
    memory: int | None,
    expected: tuple[type[Exception], ...] = (),
) -> dict[str, str]:
    """Runs every job, the largest first; one that fails does not stop the others.

    A job starts where a slot is free and the memory of all running jobs stays within bounds; one
    that needs more than there is runs alone.

    Args:
      jobs: of different names.
      slots: the cores of each process that may run beside the others; () for no restriction.
      memory: bytes for all jobs together; None for no bound.
      expected: exceptions that speak for themselves; others come with their traceback.

    Returns:
      The name of each job that failed, and why.
    """
    waiting = sorted(jobs, key=lambda job: job.memory, reverse=True)
    free, running, failures = list(slots), dict[Any, _Running](), dict[str, str]()
    while waiting or running:
        while free and (job := next_job(waiting, [each.job for each in running.values()], memory)):
            waiting.remove(job)
            started = _start(job, free.pop(0), expected)
            running[started.process.sentinel] = started
        for sentinel in wait(list(running)):
            ended = running.pop(sentinel)
            free.append(ended.cores)
            failure = _failure(ended)
            if failure is not None:
                failures[ended.job.name] = failure
                print(f"[{ended.job.name}] failed: {failure}", flush=True)
    return failures


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(processes: int) -> list[tuple[int, ...]]:
    """The cores of this process, dealt out to so many others; () each where it cannot be done."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * processes
    cores = sorted(os.sched_getaffinity(0))
    return [tuple(cores[i::processes]) for i in range(processes)]


def available_memory() -> int | None:
    """Bytes that new processes can have, or None where the system does not tell."""
    bounds = []
    if MEMORY_INFO.is_file():
        lines = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
        bounds.append(int(lines["MemAvailable"].split()[0]) * 1024)
    try:  # of a container
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            bounds.append(int(limit) - used + int(stat["inactive_file"]))
    except (OSError, ValueError, KeyError):
        pass
    return min(bounds, default=None)


def next_job(waiting: Sequence[Job], running: Sequence[Job], memory: int | None) -> Job | None:
    """The first job that fits into the memory beside those that run; any where none runs."""
    used = sum(job.memory for job in running)
    alone = not running
    fits = (job for job in waiting if alone or memory is None or used + job.memory <= memory)
    return next(fits, None)


def _start(job: Job, cores: tuple[int, ...], expected: tuple[type[Exception], ...]) -> _Running:
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of JAX
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(job, cores, expected, sender), name=job.name, daemon=True
    )
    process.start()
    sender.close()
    return _Running(job, process, receiver, cores)


def _run(
    job: Job, cores: tuple[int, ...], expected: tuple[type[Exception], ...], outcome: Connection
) -> None:
    """In the process: the job on its cores; its failure goes back as text."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX counts them to size its thread pool
    try:
        job.run(*job.arguments)
    except expected as error:
        outcome.send(str(error))
    except Exception:
        outcome.send(traceback.format_exc())
    else:
        outcome.send(None)


def _end_with_parent() -> None:
    """A job that nobody waits for would go on beside that of the next run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _failure(ended: _Running) -> str | None:
    ended.process.join()
    with ended.outcome:
        try:
            return ended.outcome.recv()
        except EOFError:
            code = ended.process.exitcode
            return f"its process ended with code {code}" + (
                ", killed: out of memory? Try --config.processes=1" if code == -9 else ""
            )
