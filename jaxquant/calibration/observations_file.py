"""The calibration file: observations as one safetensors file, whole or of an interrupted sweep.

Tensors of the file: "counts" [T, 2048], "bin_width", "min", "max", "abs_max" [T] of the observed
tensors; "examples/E/L" and "states/T/L", the leaves of the kept batches and of an observer's own
statistics; "batches" [B, 16], digests of the batches of an interrupted sweep.  The metadata
"calibration" is the rest, in JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.calibration import histogram
from jaxquant.calibration.fingerprint import DIGEST_BYTES
from jaxquant.calibration.observations import Observations, Origin, TensorStats
from jaxquant.calibration.observers import Observer, find_observer
from jaxquant.calibration.padding import Padding
from jaxquant.files import atomic, safetensors
from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import parse_json

FORM = safetensors.Format(
    "jaxquant calibration", "1", "a calibration file of jaxquant (calibration_file=)"
)
_SCALARS = ("bin_width", "min", "max", "abs_max")


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a calibration file holds.

    Attributes:
      observations: without an observer; of the batches so far.
      leaves: tensor name -> the leaves of its state, of an observer of its own.
      digests: of the batches of an interrupted sweep; None for a sweep that is done.
    """

    observations: Observations
    leaves: Mapping[str, tuple[np.ndarray, ...]]
    digests: tuple[bytes, ...] | None

    def with_observer(self, observer: Observer | None) -> Observations:
        """The observations, with the statistics of the observer that kept them.

        Raises:
          FileError: they are not of this observer.
        """
        if observer is None:
            return self.observations
        state = observer.init()
        structure, size = jax.tree.structure(state), len(jax.tree.leaves(state))
        # By numbers of leaves: the file has no structure, and the observer is trusted for it.
        if any(len(leaves) != size for leaves in self.leaves.values()):
            raise FileError("its own statistics are not of this observer")
        states = {k: jax.tree.unflatten(structure, v) for k, v in self.leaves.items()}
        if set(states) != set(self.observations.tensors):
            raise FileError("it holds no statistics of an observer of one's own")
        return dataclasses.replace(self.observations, observer=observer, states=states)


def save_observations(path: str | os.PathLike[str], observations: Observations) -> None:
    """Save what `jaxquant.calibrate` observed; `load_observations` and `quantize` read it.

    The file is a safetensors file, written beside `path` and renamed.  It holds up to 64 samples of
    the calibration data, and the first batch of each of up to four shapes.

    Raises:
      ValueError: the inputs of the model are no arrays in dicts, lists and tuples.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, jax.numpy as jnp, jaxquant
      >>> params, apply_fn = {"w": jnp.eye(4)}, lambda p, x: x @ p["w"]
      >>> observations = jaxquant.calibrate(params, apply_fn, [jnp.ones((2, 4))], progress=False)
      >>> folder = tempfile.TemporaryDirectory()
      >>> path = f"{folder.name}/calibration.safetensors"
      >>> jaxquant.save_observations(path, observations)
      >>> qparams, qapply = jaxquant.quantize(params, apply_fn, path, algo="mse")
      >>> jaxquant.load_observations(path).tensors["w/input"].count
      8
      >>> folder.cleanup()
    """
    if observations.origin is None:
        raise ValueError("these observations do not say what they are of; make them with calibrate")
    write(path, observations)


def load_observations(
    path: str | os.PathLike[str], *, algo: str | Observer | None = None
) -> Observations:
    """Load what `save_observations` or `calibration_file=` saved.

    `quantize` given the path instead checks that model and parameters are those of the file.

    Args:
      path: of the file.
      algo: the one that kept statistics of its own ("avg", or an observer of one's own), where one
        did and they are needed.

    Raises:
      FileError: a ValueError; the file is damaged, of another kind or version, or of a sweep that
        was interrupted.
      OSError: it cannot be read.

    Example:
      See `jaxquant.save_observations`.
    """
    observer = None if algo is None else find_observer(algo, hist_percent=1.0)
    saved = read(path)
    try:
        check_done(saved)
        return saved.with_observer(None if observer and observer.keeps_histogram else observer)
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None


def check_done(saved: Saved) -> None:
    """Raise FileError for the file of an interrupted sweep."""
    if saved.digests is not None:
        raise FileError(
            f"its sweep was interrupted after {saved.observations.batches} batches; pass it as "
            "calibration_file= of jaxquant.calibrate, which finishes it"
        )


def write(
    path: str | os.PathLike[str], seen: Observations, digests: tuple[bytes, ...] | None = None
) -> None:
    """Write a calibration file; with `digests`, of the batches so far of an unfinished sweep."""
    if seen.origin is None:
        raise AssertionError("observations without an origin")
    stats = list(seen.tensors.values())
    tensors: dict[str, np.ndarray] = {
        # Safetensors readers know int64; counts stay far below its end.
        "counts": np.stack([each.counts for each in stats]).astype(np.int64)
    }
    for name in _SCALARS:
        tensors[name] = np.array([getattr(each, name) for each in stats], np.float64)

    # Pytrees by the numbers of their leaves: the reader has the structures.
    for number, example in enumerate(seen.examples):
        for place, leaf in enumerate(jax.tree.leaves(example)):
            tensors[f"examples/{number}/{place}"] = np.asarray(leaf)
    for number, name in enumerate(seen.states and seen.tensors):
        for place, leaf in enumerate(jax.tree.leaves(seen.states[name])):
            tensors[f"states/{number}/{place}"] = np.asarray(leaf)
    if digests is not None:
        # In a fixed number of bytes each, so that they are one array.
        tensors["batches"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)

    record = {
        "tensors": list(seen.tensors),
        "batches": seen.batches,
        "samples": seen.samples,
        "inputs": _form(seen.examples[0]),
        "done": digests is None,
        "origin": dataclasses.asdict(seen.origin),
    }
    metadata = {"calibration": json.dumps(record, separators=(",", ":"))}
    atomic.write_file(path, safetensors.chunks(tensors, metadata, FORM))


def read(path: str | os.PathLike[str]) -> Saved:
    """Read a calibration file and check that all of it fits together.

    Raises:
      FileError: it is not such a file, of another version, or damaged.
      OSError: it cannot be read.
    """
    tensors, metadata, _ = safetensors.read(path, FORM)
    try:
        record = parse_json(metadata.get("calibration", "").encode(), "record")
        return _decode(tensors, record)
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}") from None
    # Whatever a forged record makes of Python's own functions.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileError(f"{os.fspath(path)}: the record is damaged: {error!r}") from None


def _decode(tensors: dict[str, np.ndarray], record: dict[str, Any]) -> Saved:
    # Types first: JSON holds anything, and a forged file may hold any of it.
    names = [_checked(name, str) for name in _checked(record["tensors"], list)]
    stats = _stats(tensors, names)
    done = _checked(record["done"], bool)
    batches, samples = _checked(record["batches"], int), _checked(record["samples"], int)
    digests = None
    if not done:
        table = _take(tensors, "batches", np.uint8, (batches, DIGEST_BYTES))
        digests = tuple(row.tobytes() for row in table)
    elif not any(s.count for s in stats.values()):
        raise FileError("it is of a sweep that is done, and no tensor saw data")
    # The structure of the inputs is that of every example.
    structure = jax.tree.structure(_template(record["inputs"]))
    examples = tuple(jax.tree.unflatten(structure, x) for x in _leaves(tensors, "examples"))
    # Counts that contradict each other are damage, however well each of them reads.
    if not examples or batches < len(examples) or samples < 1:
        raise FileError(f"{len(examples)} examples of {batches} batches and {samples} samples")
    states = _leaves(tensors, "states")
    if states and len(states) != len(names):
        raise FileError(f"own statistics of {len(states)} of {len(names)} tensors")
    # What nobody took is of another version, or was added by hand.
    if tensors:
        raise FileError(f"unknown tensors {sorted(tensors)[:3]}")
    origin = _origin(record["origin"])
    return Saved(
        Observations(
            stats,
            batches,
            samples,
            examples,
            origin=origin,
            padding=Padding.from_option(origin.options.get("mask")),
        ),
        {name: tuple(leaves) for name, leaves in zip(names, states)},
        digests,
    )


def _origin(data: Any) -> Origin:
    origin = Origin(**_checked(data, dict))
    for text in (
        # All that is compared later as a text has to be one.
        origin.model,
        origin.observer,
        origin.jax,
        *_checked(origin.params, dict).values(),
    ):
        _checked(text, str)
    _checked(origin.options, dict)
    return origin


def _stats(tensors: dict[str, np.ndarray], names: list[str]) -> dict[str, TensorStats]:
    if not names or len(set(names)) != len(names):
        raise FileError("the names of the tensors are none, or not distinct")
    # As many rows as names: what else the arrays hold is no tensor's.
    n = len(names)
    counts = _take(tensors, "counts", np.int64, (n, histogram.BINS))
    scalars = [_take(tensors, name, np.float64, (n,)).tolist() for name in _SCALARS]
    stats = {}
    for name, row, width, low, high, largest in zip(names, counts, *scalars):
        count = int(row.sum())
        bounds = (low, high) if count else (math.inf, -math.inf)
        # Powers of two have no other mantissa than a half.
        exponent = math.frexp(width)[1] if math.isfinite(width) else 0
        # The bounds, the bin width and the counts follow from each other in every real sweep.
        fits = (
            (row >= 0).all()
            and width == math.ldexp(0.5, exponent)
            and -126 <= exponent - 1 <= 117
            and (low, high) == bounds
            and (not count or -math.inf < low <= high < math.inf)
            and largest == (max(-low, high, 0.0) if count else 0.0)
        )
        if not fits:
            raise FileError(f"the statistics of tensor {name!r} do not fit together")
        stats[name] = TensorStats(row, width, low, high, largest, count)
    return stats


def _take(
    tensors: dict[str, np.ndarray], name: str, dtype: type, shape: tuple[int, ...]
) -> np.ndarray:
    # Taken out, so that what is left at the end is what nobody knows.
    array = tensors.pop(name, None)
    if array is None or array.dtype != dtype or array.shape != shape:
        found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise FileError(f"{name!r} is {found}, not {np.dtype(dtype)}{list(shape)}")
    return array


def _leaves(tensors: dict[str, np.ndarray], root: str) -> list[list[np.ndarray]]:
    """Take ROOT/0/0, ROOT/0/1, ..., ROOT/1/0, ...: all that there are, without gaps."""
    # Without gaps: what is behind one is left, and refused as unknown.
    found: list[list[np.ndarray]] = []
    while f"{root}/{len(found)}/0" in tensors:
        leaves: list[np.ndarray] = []
        while (name := f"{root}/{len(found)}/{len(leaves)}") in tensors:
            leaves.append(tensors.pop(name))
        found.append(leaves)
    return found


def _form(tree: Any) -> Any:
    """The structure of a pytree of arrays, for JSON."""
    # Exactly these types: a subclass would come back as its base.
    if type(tree) is dict and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _form(value) for key, value in tree.items()}}
    if type(tree) in (tuple, list):
        return {type(tree).__name__: [_form(value) for value in tree]}
    if tree is None:
        return None
    if not jax.tree_util.all_leaves([tree]):
        raise ValueError(
            f"a calibration file holds inputs of arrays in dicts with string keys, lists and "
            f"tuples; this model takes a {type(tree).__name__}"
        )
    return "array"


def _template(form: Any) -> Any:
    """A tree of the structure that `_form` was given."""
    if form is None:
        return None
    if form == "array":
        return 0
    # One entry, whose key is the kind.
    ((kind, parts),) = _checked(form, dict).items()
    if kind == "dict":
        return {key: _template(value) for key, value in _checked(parts, dict).items()}
    return {"tuple": tuple, "list": list}[kind](_template(x) for x in _checked(parts, list))


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise FileError(f"the record is damaged: {str(value)[:40]!r} is no {kind.__name__}")
    return value
