"""Whether the inputs of an int8 model are like those that it was calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_NARROWEST = 1 / 32  # of the calibrated range: a float in [0, 1] instead of [0, 255] spans 1/255


class Range(NamedTuple):
    """The least and the largest value of an input."""

    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low

    def __str__(self) -> str:
        return f"[{self.low:.4g}, {self.high:.4g}]"


Ranges = tuple[Range | None, ...]


def ranges_of(batches: Sequence[tuple[Any, ...]]) -> Ranges:
    """The range of each input, flattened, over some batches; None of what is not of floats.

    >>> ranges_of([(np.float32([0, 1]), np.int32([3])), (np.float32([-2]), np.int32([4]))])
    (Range(low=-2.0, high=1.0), None)
    """
    # By column: an input has one range over all batches.
    columns = zip(*(map(_range, jax.tree.leaves(batch)) for batch in batches), strict=True)
    return tuple(
        Range(min(r.low for r in seen), max(r.high for r in seen)) if seen else None
        for seen in ([r for r in column if r is not None] for column in columns)
    )


def has_values(inputs: Any) -> bool:
    """True where an input holds different floats: not while traced, nor in a call to warm up."""
    leaves = jax.tree.leaves(inputs)
    if any(isinstance(x, jax.core.Tracer) for x in leaves):
        return False
    return any(seen is not None and seen.width > 0 for seen in map(_range, leaves))


def find_strange(calibrated: Ranges, inputs: Any) -> str | None:
    """How the values of `inputs` differ from the calibrated ones; None where they are alike.

    They reach further beyond the calibrated range than it is wide, or use less than a 32nd of it.
    Of what is one value throughout, such as a mask, nothing is said.

    >>> find_strange((Range(0.0, 255.0),), (np.float32([0, 1]),))
    'inputs[0] is in [0, 1], in calibration it was in [0, 255]'
    """
    leaves = jax.tree_util.tree_leaves_with_path(inputs)
    for (path, leaf), known in zip(leaves, calibrated, strict=False):
        here = _range(leaf)
        # A constant has no width to compare with, here or in calibration.
        if known is None or here is None or not here.width > 0 or not known.width > 0:
            continue
        # Twice as wide as calibration saw, or hardly there: other preprocessing, not another batch.
        beyond = here.low < known.low - known.width or here.high > known.high + known.width
        if beyond or here.width < _NARROWEST * known.width:
            name = f"inputs{jax.tree_util.keystr(path)}"
            return f"{name} is in {here}, in calibration it was in {known}"
    return None


def check_kinds(calibrated: Any, inputs: Any) -> None:
    """Raise ValueError where floats stand for integers or integers for floats.

    The number of bits does not count, nor does a scalar's type.

    >>> check_kinds((np.zeros(2, np.uint8),), (np.zeros(2, np.int32),))
    """
    given = jax.tree_util.tree_leaves_with_path(inputs)
    for (path, leaf), known in zip(given, jax.tree.leaves(calibrated), strict=False):
        # uint8 for int32 is the same data, 0…255 for 0…1 is not: only kinds count.
        kinds = {_kind(leaf), _kind(known)}
        if known.shape and np.shape(leaf) and len(kinds) > 1:
            raise ValueError(
                f"inputs{jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}, but the model was "
                f"calibrated with {known.dtype}: the same values as another type are other data, "
                "such as 0…255 and 0…1. Convert it as in calibration, or calibrate with what the "
                "model will get"
            )


def _kind(x: Any) -> str:
    dtype = jnp.result_type(x)
    for kind in (jnp.floating, jnp.complexfloating):
        if jax.dtypes.issubdtype(dtype, kind):
            return str(kind)
    return "other"  # integers, truth values, keys


def _range(x: Any) -> Range | None:
    """The range of an array of floats, found where it is, so that two numbers travel."""
    if not jax.dtypes.issubdtype(jnp.result_type(x), jnp.floating) or not np.size(x):
        return None
    library = np if _is_in_memory(x) else jnp  # NumPy has nothing to compile
    return Range(float(library.min(x)), float(library.max(x)))


def _is_in_memory(x: Any) -> bool:
    """True where NumPy reads the array as it is: no copy from a device or another process."""
    if not isinstance(x, jax.Array):
        return True
    return x.is_fully_addressable and all(device.platform == "cpu" for device in x.devices())
