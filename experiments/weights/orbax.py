"""Reads Orbax checkpoints of Flax variables, such as a training run of ours leaves."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.weights import limits
from experiments.weights.tree import WeightsError
from jaxquant.extras import how_to_install


def read_orbax(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint folder as "layer/leaf", without the names of the collections.

    Raises:
      WeightsError: Orbax is not installed, or the folder is no checkpoint of a tree of arrays.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise WeightsError(
            f"{path}: reading an Orbax checkpoint needs orbax-checkpoint: "
            f"{how_to_install('experiments')}"
        ) from error
    with limits.refusing(Path(path), "not an Orbax checkpoint of variables"):
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(Path(path).absolute()).item_metadata.tree
            _check_sizes(jax.tree.leaves(saved))
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            variables = checkpointer.restore(Path(path).absolute(), restore_args=as_numpy)
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        return {
            "/".join(str(key.key) for key in keys[1:]): np.asarray(leaf) for keys, leaf in leaves
        }


def _check_sizes(arrays: Sequence[Any]) -> None:
    """Raise WeightsError where what a checkpoint says that it holds is too large."""
    total = 0
    for array in arrays:
        dtype = np.dtype(array.dtype)
        total += math.prod(limits.checked_shape(array.shape, dtype)) * dtype.itemsize
    if total > limits.MAX_BYTES:
        raise WeightsError(f"its arrays take {total} bytes; at most {limits.MAX_BYTES} are read")
