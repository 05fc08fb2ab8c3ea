"""Reads weights of any format, a file by its suffix, as a flat mapping of names to arrays."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.weights.keras import read_h5, read_tfjs
from experiments.weights.npz import read_npz
from experiments.weights.orbax import read_orbax
from experiments.weights.safetensors import read_safetensors
from experiments.weights.torch_pth import read_pth
from experiments.weights.tree import WeightsError

READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    ".pth": read_pth,
    ".pt": read_pth,
    ".safetensors": read_safetensors,
    ".npz": read_npz,
    ".json": read_tfjs,
    ".h5": read_h5,
    ".hdf5": read_h5,
}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The names and arrays of a weight file, or of the folder of an Orbax checkpoint.

    Raises:
      WeightsError: there is no such file, its suffix is not known, or its reader refuses it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_orbax(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weight file")
    if path.suffix.lower() not in READERS:
        raise WeightsError(f"{path}: the suffix is none of {', '.join(READERS)}")
    return READERS[path.suffix.lower()](path)
