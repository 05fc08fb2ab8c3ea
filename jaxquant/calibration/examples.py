"""Which batches are kept beside the statistics, for comparisons of both models."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxquant.graph.calls import shapes_text

_KEPT_SAMPLES = 64  # of the inputs, for comparisons of both models
_KEPT_SHAPES = 4  # likewise: each costs every recovery step a compilation


def with_example(
    examples: tuple[tuple[Any, ...], ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Any, ...], ...]:
    """The examples, with one more batch where it is to be kept beside them.

    Those are up to 64 samples of shapes that are there, and the first of each other shape, up to
    four.  One that differs in its first axis alone, as the last batch of a data set, tells nothing
    new for what it costs to compile.
    """
    if not examples:
        # The first batch is what the report's errors are measured on.
        return (inputs,)
    shapes = {shapes_text(example) for example in examples}
    if shapes_text(inputs) in shapes:
        samples = sum(map(batch_length, (*examples, inputs)))
        # Samples of a known shape cost memory alone.
        return (*examples, inputs) if samples <= _KEPT_SAMPLES else examples
    is_other = _sizes_of_a_sample(inputs) not in map(_sizes_of_a_sample, examples)
    return (*examples, inputs) if is_other and len(shapes) < _KEPT_SHAPES else examples


def _sizes_of_a_sample(inputs: tuple[Any, ...]) -> list[tuple[int, ...]]:
    return [np.shape(x)[1:] for x in jax.tree.leaves(inputs)]


def batch_length(inputs: tuple[Any, ...]) -> int:
    """How many samples a batch has: the first axis of its first array; counters have none."""
    lengths = [np.shape(x)[0] for x in jax.tree.leaves(inputs) if np.ndim(x)]
    return int(lengths[0]) if lengths else 1
