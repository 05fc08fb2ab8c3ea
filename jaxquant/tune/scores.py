"""Scores of a metric for many mixtures of a model, kept in a file so that they are taken once."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np

from jaxquant.calibration.fingerprint import params_digests
from jaxquant.files import atomic
from jaxquant.files.errors import FileError
from jaxquant.plan.plan import Plan
from jaxquant.tune.switch import Switch

Model: TypeAlias = Callable[..., Any]
Metric: TypeAlias = Callable[[Model], Any]
_FORMAT = "jaxquant sensitivity"
_VERSION = 1


def score(metric: Metric, model: Model) -> float:
    """The metric of a model, checked.

    Raises:
      TypeError: it is not one number.
      ValueError: it is not finite.
    """
    found = metric(model)
    # Metrics return numbers of any library, and arrays of one element.
    value = np.asarray(found)
    if value.size != 1 or not np.issubdtype(value.dtype, np.number):
        raise TypeError(
            "metric(model) returns one number, higher for a better model; got "
            f"{type(found).__name__} of shape {list(value.shape)}"
        )
    number = float(value.reshape(()))
    if not math.isfinite(number):
        raise ValueError(f"metric(model) returned {number}; it has to be finite")
    return number


class Scores:
    """The scores of mixtures; each is taken once, and read from the file where it is there.

    Args:
      switch: gives the mixtures.
      metric: model -> score, higher is better.
      path: of the file, None for none.
      digest: tells the models apart, see `models_digest`; of no use without a file.

    Raises:
      FileError: the file is of other models or another metric, or is damaged.
    """

    def __init__(
        self,
        switch: Switch,
        metric: Metric,
        path: str | os.PathLike[str] | None = None,
        digest: str = "",
    ):
        self._switch = switch
        self._metric = metric
        self._path = path
        self._digest = digest
        self._known: dict[str, float] = {}
        if path is not None:
            # Told before the first score is taken.
            atomic.check_writable(path)
            if os.path.exists(path):
                self._known = _read(path, digest)
                self._check_metric()

    def __call__(self, int8: Collection[str]) -> float:
        """The score where these sites are int8 and the others float."""
        key = _key(int8)
        # By names, in any order: a mixture is a set.
        if key not in self._known:
            self._known[key] = score(self._metric, self._switch.model(int8))
            # Each time: a score may take minutes, and a run may end at any moment.
            self._write()
        return self._known[key]

    def _check_metric(self) -> None:
        key = _key(self._switch.names)
        if key not in self._known:
            return
        # One score tells whether the metric is the same: the int8 model's, which is always there.
        here = score(self._metric, self._switch.model(self._switch.names))
        if here != self._known[key]:
            raise FileError(
                f"{os.fspath(self._path or '')} is of another metric or other data: the int8 model "
                f"scores {here}, in the file {self._known[key]}. Give another file, or delete this "
                "one to begin anew"
            )

    def _write(self) -> None:
        if self._path is None:
            return
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "models": self._digest,
            "scores": self._known,
        }
        # Whole after each score: an interrupt may come at any.
        atomic.write_file(self._path, [json.dumps(content, indent=1).encode()])


def models_digest(params: Any, qparams: Any, plan: Plan) -> str:
    """Tells two pairs of a float and an int8 model apart."""
    # Packed weights are those of this machine alone.
    parts = {"params": params, "qparams": {k: v for k, v in qparams.items() if k != "packed"}}
    text = json.dumps([sorted(params_digests(parts).items()), plan.to_json()])
    return hashlib.sha256(text.encode()).hexdigest()


def _key(int8: Collection[str]) -> str:
    return hashlib.sha256("\n".join(sorted(int8)).encode()).hexdigest()[:24]


def _read(path: str | os.PathLike[str], digest: str) -> dict[str, float]:
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = json.load(file)
        known = {str(key): float(value) for key, value in content["scores"].items()}
        # Any fault of the text is the same to the caller: no scores to go on from.
        is_ours = content["format"] == _FORMAT and content["version"] == _VERSION
        models = content["models"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{where} is not a file of sensitivities, or is damaged: {error}") from None
    if not is_ours:
        raise FileError(f"{where} is not a file of sensitivities that this release reads")
    # By a digest of both models: the scores of others look just the same.
    if models != digest:
        raise FileError(
            f"{where} is of another model, other parameters or another quantization. Give another "
            "file, or delete this one to begin anew"
        )
    return known
