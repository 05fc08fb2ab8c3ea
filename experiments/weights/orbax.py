"""Reads Orbax checkpoints of Flax variables, such as a training run of ours leaves."""

from pathlib import Path

import jax
import numpy as np

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
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            saved = checkpointer.metadata(Path(path).absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            variables = checkpointer.restore(Path(path).absolute(), restore_args=as_numpy)
    except (FileNotFoundError, ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{path}: not an Orbax checkpoint of variables: {error}") from error
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(str(key.key) for key in keys[1:]): np.asarray(leaf) for keys, leaf in leaves}
