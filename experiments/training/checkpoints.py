"""Checkpoints of a run, from which it goes on as if it had never stopped."""

from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp

from experiments.training import TrainingError
from experiments.training.step import State

FOLDER = "checkpoints"
WEIGHTS = "weights"


class Checkpoints:
    """The checkpoints in a work folder, each whole or absent; a context manager.

    A checkpoint is a folder named after its step, with the network's variables, which
    `experiments.weights.orbax` reads, and the optimizer's state beside them.
    """

    def __init__(self, workdir: Path, keep: int = 2) -> None:
        """`keep`: how many of the newest stay."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=False
        )
        self._folder = workdir.absolute() / FOLDER
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: State) -> None:
        """Saves the state under its step; does nothing where that step is saved already."""
        step = int(state.step)
        if step == self.latest():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(state.variables),
                optimizer=ocp.args.StandardSave({"state": state.optimizer, "step": state.step}),
            ),
        )

    def restore(self, like: State) -> State:
        """The newest state.

        Args:
          like: a state of the same run, for the shapes, the types and the devices.

        Raises:
          TrainingError: the checkpoint is of another network or optimizer.
        """
        variables, optimizer, step = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, (like.variables, like.optimizer, like.step)
        )
        try:
            restored = self._manager.restore(
                self.latest(),
                args=ocp.args.Composite(
                    variables=ocp.args.StandardRestore(variables),
                    optimizer=ocp.args.StandardRestore({"state": optimizer, "step": step}),
                ),
            )
        except (ValueError, KeyError) as error:
            raise TrainingError(
                f"{self._folder}: the checkpoint of step {self.latest()} does not fit this run: "
                f"{error}"
            ) from error
        saved = restored["optimizer"]
        return State(saved["step"], restored["variables"], saved["state"])


def save_weights(workdir: Path, state: State) -> Path:
    """Saves the network's variables alone, for `--config.weights` of the other experiments."""
    path = workdir.absolute() / WEIGHTS
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state.variables, force=True)
    return path
