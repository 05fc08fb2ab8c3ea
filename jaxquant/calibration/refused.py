"""What may be wrong with a batch that the model did not take: the note on its error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.graph.calls import CallError, ModelError, shapes_text

_COLOURS = (1, 3)


def explain(error: Exception, inputs: tuple[Any, ...], batch_size: int | None) -> str:
    """The inputs of a batch, and of the usual mistakes those that it looks like.

    Args:
      error: what the model raised while it was traced.
      inputs: of the batch.
      batch_size: the argument of that name.

    >>> explain(ValueError(), ({"image": np.ones((2, 8)), "label": np.ones(2)},), None)
    "calibration called apply_fn(params, *inputs) with inputs of {'image': float32[2, 8], \
'label': float32[2]}. A dict is one argument: if the model takes one entry of it, pick that with \
select='image'"
    """
    guesses = _guesses(inputs)
    is_of_values = isinstance(error, jax.errors.JAXTypeError)  # a traced `if`, `np.asarray(x)`, ...
    is_told = isinstance(error, CallError | ModelError)
    if not (guesses or is_of_values or is_told):
        guesses.append(
            f"batch_size={batch_size} has stacked {batch_size} items of ds on a new first axis: "
            "leave it out where they are batches already"
            if batch_size
            else "An item of ds is a batch here: where it is a single sample, give batch_size="
        )
    called = f"calibration called apply_fn(params, *inputs) with inputs of {shapes_text(inputs)}"
    return ". ".join([called, *guesses])


def _guesses(inputs: tuple[Any, ...]) -> list[str]:
    said = []
    if len(inputs) > 1:
        said.append(
            "If not all of them are the model's (labels, say), pick those that are: select=0"
        )
    for x in inputs:
        if isinstance(x, Mapping) and x:
            # The largest entry is likely the images, the others labels and names.
            key = max(x, key=lambda name: sum(map(np.size, jax.tree.leaves(x[name]))))
            said.append(
                "A dict is one argument: if the model takes one entry of it, pick that with "
                f"select={key!r}"
            )
        elif getattr(x, "ndim", 0) == 4 and x.shape[1] in _COLOURS and x.shape[3] not in _COLOURS:
            said.append(
                "Images with the channels first, as PyTorch and Paddle have them? Flax has them "
                "last: `lambda p, x: apply_fn(p, x.transpose(0, 2, 3, 1))`"
            )
    return said
