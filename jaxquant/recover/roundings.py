"""What learned rounding has finished, in a file: an interrupted run loses one site.

The file is a sealed safetensors file (`jaxquant.files.safetensors`), so a damaged one is refused.
Its tensors: "digests" [S, 32] uint8 and "errors" [S, 2] float64 of its S sites, and "up/0",
"up/1", ..., which weights of each are rounded up, eight in a byte.  The metadata "roundings" is the
rest, in JSON: the names of the sites, and what they are of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.calibration.fingerprint import batch_digest, model_digest, params_digests
from jaxquant.files import atomic, safetensors
from jaxquant.files.errors import FileError
from jaxquant.files.strict_json import parse_json
from jaxquant.graph import ir

FORM = safetensors.Format(
    "jaxquant roundings", "1", "a file of learned roundings of jaxquant (recovery_file=)"
)
_DIGEST = hashlib.sha256().digest_size
_SHOWN = 3  # of the parameters that differ


class Rounding(NamedTuple):
    """up: bool, which weights are rounded up; the site's errors with nearest and with this one."""

    up: np.ndarray
    nearest: float
    learned: float


@dataclasses.dataclass(frozen=True)
class Origin:
    """What roundings were learned from: digests of the function, its parameters and the samples.

    `jax` is the version that traced the function, which another version may trace otherwise.
    """

    model: str
    params: Mapping[str, str]
    data: str
    jax: str

    def differences(self, other: Origin) -> list[str]:
        """One phrase for each way in which a file, made with `other`, does not belong here."""
        found = []
        if self.model != other.model:
            # Another version of jax may write another graph of the same function.
            by_jax = f", or jax {other.jax}, which it was made with, traces it otherwise"
            found.append("apply_fn computes something else" + by_jax * (self.jax != other.jax))
        names = [
            name
            for name in {**other.params, **self.params}
            if self.params.get(name) != other.params.get(name)
        ]
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            found.append(f"the parameters {', '.join(map(repr, names[:_SHOWN]))}{more} differ")
        if self.data != other.data:
            found.append("the calibration samples differ")
        return found


def make_source(graph: ir.Graph, params: Any, examples: Sequence[tuple[Any, ...]]) -> Origin:
    """What the roundings of a model on calibration samples are learned from."""
    data = hashlib.sha256()
    for inputs in examples:
        data.update(batch_digest(inputs))
    return Origin(model_digest(graph), params_digests(params), data.hexdigest(), jax.__version__)


class _Record(NamedTuple):
    """One site of the file: the digest of its problem, and its rounding with the bits packed."""

    digest: bytes
    packed: np.ndarray
    errors: tuple[float, float]


class Roundings:
    """The roundings of the sites that are done, kept in a file where a path is given.

    A site's rounding is known by a digest of its weight, inputs and outputs: where other options
    change those, the site is learned anew.

    Args:
      path: of the file, there or not; None for none.
      source: gives what the roundings are learned from; it is called where there is a path.

    Raises:
      FileError: a ValueError; the file is of another model, other parameters or other samples, or
        it is damaged or none of learned roundings.
    """

    def __init__(self, path: str | os.PathLike[str] | None, source: Callable[[], Origin]):
        self._path = None if path is None else Path(path)
        self._records: dict[str, _Record] = {}
        if self._path is None:
            return
        # Traced for the file alone: without one it is not needed.
        self._source = source()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Told before hours of learning.
        atomic.check_writable(self._path)
        if self._path.exists():
            self._records = _read(self._path, self._source)

    def get(self, name: str, digest: bytes, shape: tuple[int, ...]) -> Rounding | None:
        """The rounding of a site; None where it is not there or of other inputs.

        Raises:
          FileError: it is not of this shape.
        """
        record = self._records.get(name)
        if record is None or record.digest != digest:
            return None
        size = int(np.prod(shape))
        bits = np.unpackbits(record.packed)
        # The last byte is filled up with zeros: others are no roundings.
        if len(record.packed) != -(-size // 8) or bits[size:].any():
            raise FileError(
                f"recovery_file={str(self._path)!r}: site {name!r} has {len(record.packed)} bytes, "
                f"which are no rounding of {size} weights. Delete the file to begin anew"
            )
        return Rounding(bits[:size].astype(bool).reshape(shape), *record.errors)

    def put(self, name: str, digest: bytes, rounding: Rounding) -> None:
        """Keep a rounding, and write the file anew beside the old one."""
        if self._path is None:
            return
        errors = (float(rounding.nearest), float(rounding.learned))
        self._records[name] = _Record(digest, np.packbits(rounding.up), errors)
        records = list(self._records.values())
        # Whole each time: it is a bit a weight, and a torn file would be worth nothing.
        tensors = {f"up/{k}": record.packed for k, record in enumerate(records)}
        digests = b"".join(record.digest for record in records)
        tensors["digests"] = np.frombuffer(digests, np.uint8).reshape(-1, _DIGEST)
        tensors["errors"] = np.array([record.errors for record in records], np.float64)
        text = {"sites": list(self._records), "source": dataclasses.asdict(self._source)}
        metadata = {"roundings": json.dumps(text, separators=(",", ":"))}
        atomic.write_file(self._path, safetensors.chunks(tensors, metadata, FORM))


def digest(*arrays: np.ndarray) -> bytes:
    """32 bytes that tell arrays apart."""
    found = hashlib.sha256()
    for array in arrays:
        # Dtype and shape too: bytes alone are the same for many arrays.
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return found.digest()


def _read(path: Path, source: Origin) -> dict[str, _Record]:
    """The records of a file, once it is known to be of this source."""
    try:
        tensors, metadata, _ = safetensors.read(path, FORM)
        text = parse_json(metadata.get("roundings", "").encode(), "record")
        saved, records = _decode(tensors, text)
    except FileError as error:
        raise FileError(
            f"recovery_file={str(path)!r} is damaged, or is none of this release: {error}. Delete "
            "it or give another path"
        ) from None

    # Damaged and of another model are two errors, with two remedies.
    if differences := source.differences(saved):
        raise FileError(
            f"recovery_file={str(path)!r} is of another quantization: {'; '.join(differences)}. "
            "Give another path, or delete it to learn anew"
        )
    return records


def _decode(
    tensors: dict[str, np.ndarray], text: dict[str, Any]
) -> tuple[Origin, dict[str, _Record]]:
    if set(text) != {"sites", "source"} or not isinstance(text["sites"], list):
        raise FileError("its record is damaged")
    names, source = text["sites"], _source(text["source"])
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise FileError("the names of its sites are damaged")
    # A file may be damaged or forged: every name, dtype and shape is looked at before use.
    wanted = {
        "digests": (np.dtype(np.uint8), (len(names), _DIGEST)),
        "errors": (np.dtype(np.float64), (len(names), 2)),
    }
    bits = [f"up/{k}" for k in range(len(names))]
    if set(tensors) != {*wanted, *bits}:
        raise FileError(f"it does not hold the roundings of {len(names)} sites")
    for name, (dtype, shape) in wanted.items():
        if (tensors[name].dtype, tensors[name].shape) != (dtype, shape):
            raise FileError(f"{name!r} is {tensors[name].dtype}{list(tensors[name].shape)}")
    if any(tensors[name].dtype != np.uint8 or tensors[name].ndim != 1 for name in bits):
        raise FileError("the roundings are no bytes")
    # Names go by number in the file: they may hold what no name of a tensor may.
    rows = zip(tensors["digests"], bits, tensors["errors"].tolist(), strict=True)
    records = [_Record(known.tobytes(), tensors[name], tuple(both)) for known, name, both in rows]
    return source, dict(zip(names, records, strict=True))


def _source(data: Any) -> Origin:
    fields = {field.name for field in dataclasses.fields(Origin)}
    if not isinstance(data, dict) or set(data) != fields or not isinstance(data["params"], dict):
        raise FileError("its record of what it is of is damaged")
    texts = [*data["params"].values(), data["model"], data["data"], data["jax"]]
    if not all(isinstance(text, str) for text in texts):
        raise FileError("its record of what it is of is damaged")
    return Origin(**data)
