"""A sweep with a calibration file: begun, gone on with after an interruption, or not needed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxquant.calibration import observations_file
from jaxquant.calibration.fingerprint import batch_digest
from jaxquant.calibration.observations import Observations, Origin
from jaxquant.calibration.observations_file import Saved
from jaxquant.calibration.observers import Observer
from jaxquant.calibration.sweep import Sweep
from jaxquant.files import atomic
from jaxquant.files.errors import FileError

_SECONDS = 30.0  # between two writes: what a kill loses at most
DATA_OPTIONS = ("batch_size", "batch_nums", "select", "mask")


def sweep_with_file(
    path: str | os.PathLike[str],
    sweep: Sweep,
    batches: Iterator[tuple[Any, ...]],
    observer: Observer | None,
) -> Observations:
    """The observations that a file holds, or those of a sweep that is saved as it goes.

    The state is written after the first batch, at most every 30 seconds from then on, where an
    error or an interrupt ends the sweep, and at its end.

    Args:
      path: of the file, there or not.
      sweep: one that has not begun.
      batches: of the data; not touched where the file is of a sweep that is done.
      observer: that of the sweep.

    Raises:
      FileError: the file is damaged, or of another model, other parameters or options, or `batches`
        do not begin with those that the interrupted sweep has seen.
    """
    # Before the sweep, not after an hour of it.
    atomic.check_writable(path)
    digests: list[bytes] = []
    # A file that is there is gone on with, whatever made it.
    if os.path.exists(path):
        saved = observations_file.read(path)
        seen = check_saved(path, saved, sweep, observer, DATA_OPTIONS)
        if saved.digests is None:
            return seen
        # Read again, since a generator has no other way to come to the next batch.
        _skip(path, batches, saved.digests)
        sweep.restore(seen)
        digests += saved.digests
    return _observe(path, sweep, batches, digests)


def load_checked(
    path: str | os.PathLike[str], sweep: Sweep, observer: Observer | None
) -> Observations:
    """The observations of a file, once it is known to be of this model and these parameters.

    Raises:
      FileError: as `sweep_with_file`, or the file is of an interrupted sweep.
    """
    saved = observations_file.read(path)
    seen = check_saved(path, saved, sweep, observer, ())
    try:
        # Of another model first: that it is not done would be no help then.
        observations_file.check_done(saved)
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None
    return seen


def is_complete(path: str | os.PathLike[str] | None) -> bool:
    """True for a calibration file of a sweep that is done.

    Raises:
      FileError: the file is damaged.
    """
    if path is None or not os.path.exists(path):
        return False
    return observations_file.read(path).digests is None


def check_observed(observations: Observations, sweep: Sweep) -> None:
    """Raise ValueError where observations are of another model or of other parameters.

    `sweep` is started.  Observations that were put together by hand have no origin to compare.
    """
    # Observations that a user put together have no origin to compare.
    if observations.origin is None:
        return
    here, _ = sweep.start(observations.examples[0])
    if other := _other_model(observations.origin, here, "in calibration"):
        raise ValueError(
            f"the observations are of another model or other parameters: {_first(other)}. "
            "Calibrate the model that is quantized"
        )


def check_saved(
    path: str | os.PathLike[str],
    saved: Saved,
    sweep: Sweep,
    observer: Observer | None,
    data_options: Sequence[str],
) -> Observations:
    """The observations of a file; starts `sweep`.

    Raises:
      FileError: they are of another model or other parameters, they lack what these options need,
        or one of `data_options` differs; the message says what.
    """
    seen = saved.observations
    if seen.origin is None:
        raise AssertionError("a file without an origin")
    try:
        here, names = sweep.start(seen.examples[0])
    except Exception as error:
        error.add_note(f"apply_fn was called with the inputs that {os.fspath(path)} holds.")
        raise
    # Model and parameters first: with others, differences in the options say nothing.
    other = _other_model(seen.origin, here)
    if other:
        raise _refusal(path, "another model or other parameters", other)
    other = _other_observations(saved, here, names, observer)
    other += [
        _spell_option(name, seen.origin, here)
        for name in data_options
        if seen.origin.options.get(name) != here.options.get(name)
    ]
    if other:
        raise _refusal(path, "other options", other)
    # Last: own observers have states that only their code can read.
    try:
        return saved.with_observer(observer)
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None


def _observe(
    path: str | os.PathLike[str],
    sweep: Sweep,
    batches: Iterator[tuple[Any, ...]],
    digests: list[bytes],
) -> Observations:
    # Written after the first batch, to find out early that the path cannot be written to.
    due = 0.0
    try:
        for inputs in batches:
            # Before the batch is added: an interrupt in between leaves a digest too many, which is
            # cut off.
            digests[sweep.batches :] = [batch_digest(inputs)]
            sweep.add(inputs)
            if time.monotonic() >= due and _write(path, sweep, digests):
                due = time.monotonic() + _SECONDS
        observations = sweep.finish()
    # An error and Ctrl-C alike leave the file as far as the sweep came.
    except BaseException as error:
        try:
            _write(path, sweep, digests)
        except Exception as other:
            error.add_note(f"The calibration file was not brought up to date: {other}")
        raise
    observations_file.write(path, observations)
    return observations


def _write(path: str | os.PathLike[str], sweep: Sweep, digests: Sequence[bytes]) -> bool:
    """Write the state where it is whole and of finite activations."""
    # What is not whole, or not finite, is no state to go on from.
    sound = sweep.is_sound()
    if sound:
        observations_file.write(path, sweep.observations(), tuple(digests[: sweep.batches]))
    return sound


def _skip(
    path: str | os.PathLike[str], batches: Iterator[tuple[Any, ...]], digests: Sequence[bytes]
) -> None:
    """Read the batches that have been seen, and check that they are those."""
    hint = (
        "To go on, ds must give the same batches in the same order again (seed its shuffling, and "
        f"pass a callable instead of a generator that was read); or delete {os.fspath(path)} to "
        "begin anew."
    )

    # Each batch is read again: a data set can be told by its batches alone.
    for index, known in enumerate(digests):
        inputs = next(batches, None)
        if inputs is None:
            raise FileError(
                f"ds ended after {index} batches; the interrupted sweep in {os.fspath(path)} has "
                f"seen {len(digests)}. {hint}"
            )
        if batch_digest(inputs) != known:
            raise FileError(
                f"batch {index} of ds is not the one that the interrupted sweep in "
                f"{os.fspath(path)} has seen. {hint}"
            )


def _other_model(saved: Origin, here: Origin, there: str = "in the file") -> list[str]:
    changed = [
        f"params[{name!r}] is {_spell_leaf(here.params, name)}, {there} "
        f"{_spell_leaf(saved.params, name)}"
        # Values are digests: that they differ is known, and not how.
        + (", with other values" if _same_shape(saved.params, here.params, name) else "")
        for name in {**saved.params, **here.params}
        if saved.params.get(name) != here.params.get(name)
    ]
    if saved.model != here.model:
        changed.append(
            "apply_fn computes something else"
            if saved.jax == here.jax
            else f"apply_fn computes something else, or jax {here.jax} traces it otherwise than "
            f"jax {saved.jax}, which the file was made with"
        )
    return changed


def _other_observations(
    saved: Saved, here: Origin, names: Sequence[str], observer: Observer | None
) -> list[str]:
    origin = saved.observations.origin
    if origin is None:
        raise AssertionError("a file without an origin")
    there = list(saved.observations.tensors)
    # More tensors than are asked for are no fault: other options may want them.
    missing = [name for name in names if name not in there]
    problems = []
    if missing:
        problems.append(f"it holds nothing on {', '.join(map(repr, missing[:3]))}")
    elif saved.digests is not None and list(names) != there:
        problems.append("its interrupted sweep observes more tensors")
    if problems:
        # The options that explain why other tensors are observed.
        known = {**origin.options, **here.options}
        problems += [
            _spell_option(name, origin, here)
            for name in known
            if name not in (*DATA_OPTIONS, "algo")
            and origin.options.get(name) != here.options.get(name)
        ]
    if observer is not None and origin.observer != here.observer:
        problems.append(_spell_option("algo", origin, here) + ", which keeps statistics of its own")
    return problems


def _spell_option(name: str, saved: Origin, here: Origin) -> str:
    return f"{name} is {here.options.get(name)!r}, in the file {saved.options.get(name)!r}"


def _spell_leaf(params: Mapping[str, str], name: str) -> str:
    return params[name].partition(" ")[0] if name in params else "missing"


def _same_shape(saved: Mapping[str, str], here: Mapping[str, str], name: str) -> bool:
    return _spell_leaf(saved, name) == _spell_leaf(here, name)


def _refusal(path: str | os.PathLike[str], what: str, problems: Sequence[str]) -> FileError:
    return FileError(
        f"{os.fspath(path)} is of {what}: {_first(problems)}. Give another "
        "calibration_file, or delete this one to calibrate anew"
    )


def _first(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(problems[:3]) + more
