"""The rows of the accuracy table: what a row is of, and the finished ones on disk.

A row is measured once.  It is kept under a digest of all that its figures depend on, so that other
weights, other images or a changed line of the library make another row.
"""

import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import jaxquant
from experiments import zoo
from experiments.accuracy.methods import Method
from experiments.data import Dataset
from experiments.evaluate import Evaluation
from experiments.files import replacing, write_text
from experiments.settings import choose_data, model_input

EXPERIMENTS = Path(__file__).parents[1]
# What the figures of a float network depend on, beside its weights and images.
FLOAT_SOURCES = (
    "models",
    "weights",
    "data.py",
    "evaluate.py",
    "imagenet.py",
    "loader.py",
    "preprocessing.py",
    "settings.py",
    "zoo.py",
)
ROW_SOURCES = ("accuracy/intervals.py", "accuracy/measure.py", "results.py")


class Network(NamedTuple):
    """One network of the table, with the settings that are its own.

    Attributes:
      name: in the zoo.
      config: settings as in `configs/common.py`.
      key: all that the figures of the float network depend on; None without weights.
      library: what a row depends on beside it.  It is as old as the plan, so that a source that
        changes while processes run does not pass for what they ran.
    """

    name: str
    config: ConfigDict
    key: dict[str, Any] | None
    library: dict[str, str]

    def row_key(self, method: Method) -> dict[str, Any]:
        """All that the figures of the network under a method depend on."""
        return {
            "model": self.name,
            "method": method.name,
            "options": method.options,
            **(self.key or {}),
            **self.library,
        }


def network(config: ConfigDict, name: str, backend: str) -> Network:
    """One network of the table.

    Args:
      config: as `configs/accuracy_table.py`.
      name: of the network.
      backend: that it will run on.

    Raises:
      WeightsError, FetchError, DataError: given weights or images are not there.
    """
    own = ConfigDict(
        {k: v for k, v in config.items() if k not in ("models", "weights", "per_model")}
    )
    own.model, own.weights = name, config.weights.get(name, "")
    own.progress = False  # processes write side by side
    own.update(config.per_model.get(name, {}))
    if own.weights == "random":
        weights: str | None = "random"
    else:
        weights = zoo.weights_fingerprint(name, own.weights or None)
    library = {"jaxquant": jaxquant.__version__, "source": _library_sources()}
    if weights is None:
        return Network(name, own, None, library)
    calibration, evaluation = choose_data(own, model_input(own).size)
    key = {
        "weights": weights,
        "evaluation": _identity(evaluation),
        "calibration": _identity(calibration),
        "image_size": own.image_size,
        "batch_size": own.batch_size,
        "backend": backend,
        "jax": jax.__version__,
        "experiments": _experiment_sources(),
    }
    return Network(name, own, key, library)


class Store:
    """Finished rows and the logits of float networks, a file each, in a work folder."""

    def __init__(self, workdir: str | Path) -> None:
        self._workdir = Path(workdir)

    def row(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """A finished row."""
        path = self.row_path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def save_row(self, key: dict[str, Any], figures: dict[str, Any]) -> None:
        """Keeps a finished row: its key and its figures.  JSON has no infinity: it becomes null."""
        finite = {k: None if v in (math.inf, -math.inf) else v for k, v in figures.items()}
        row = json.dumps(key | finite, indent=1, allow_nan=False)
        write_text(self.row_path(key), row + "\n")

    def evaluation(self, network: Network) -> Evaluation | None:
        """What the float network said, if an earlier run kept it whole."""
        try:
            with self.evaluation_path(network).open("rb") as file, np.load(file) as kept:
                return Evaluation(kept["logits"], kept["labels"], float(kept["seconds"]))
        except (FileNotFoundError, zipfile.BadZipFile):
            return None

    def save_evaluation(self, network: Network, evaluation: Evaluation) -> None:
        """Keeps what the float network said."""
        with replacing(self.evaluation_path(network), "wb") as file:
            np.savez(file, **evaluation._asdict())

    def row_path(self, key: dict[str, Any]) -> Path:
        """Where a row is kept."""
        return self._workdir / "rows" / f"{key['model']}-{key['method']}-{_digest(key)}.json"

    def evaluation_path(self, network: Network) -> Path:
        """Where the logits of the float network are kept."""
        key = {k: v for k, v in (network.key or {}).items() if k != "calibration"}
        return self._workdir / "float32" / f"{network.name}-{_digest(key)}.npz"


def _identity(dataset: Dataset) -> dict[str, Any]:
    return {"name": dataset.name, "images": dataset.size, "fingerprint": dataset.fingerprint}


@cache
def _library_sources() -> str:
    root = Path(jaxquant.__file__).parent
    rows = [EXPERIMENTS / name for name in ROW_SOURCES]
    return _fingerprint(root, sorted(root.rglob("*.py"))) + _fingerprint(EXPERIMENTS, rows)


@cache
def _experiment_sources() -> str:
    given = [EXPERIMENTS / name for name in FLOAT_SOURCES]
    files = [f for path in given for f in (sorted(path.rglob("*.py")) or [path])]
    return _fingerprint(EXPERIMENTS, files)


def _fingerprint(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
