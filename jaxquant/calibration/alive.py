"""Whether a data set has data: a loader that is broken gives one value, again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxquant.jax_shim import prng

_FEW = 16  # values that may well be equal


class Alive:
    """Reads batches until an input holds two different values; from then on it reads no more."""

    def __init__(self) -> None:
        self._known: list[Any] | None = None  # the one value of each input
        self._values = 0
        self._found = False

    def see(self, inputs: tuple[Any, ...]) -> None:
        """Look at one more batch."""
        if self._found:
            return
        # PRNG keys are no data, and do not compare.
        leaves = [_here(x) for x in jax.tree.leaves(inputs) if not _is_key(x)]
        # The first value of each input; one that is found to differ ends the search.
        known = self._known or [np.asarray(x[(0,) * x.ndim]) for x in leaves if x.size]
        self._known, self._values = known, self._values + sum(x.size for x in leaves)
        self._found = not all(
            bool((x == value).all())
            for x, value in zip((x for x in leaves if x.size), known, strict=False)
        )

    def resume(self, examples: Sequence[tuple[Any, ...]], batches: int) -> None:
        """Take up a sweep that has seen `batches`, of which `examples` are left."""
        for inputs in examples:
            self.see(inputs)
        # More batches than were kept passed before: somewhere among them values differed.
        self._found |= batches > len(examples)

    def check(self) -> None:
        """Raise ValueError where all that was seen is one value."""
        # A handful of values may well be equal.
        if self._found or self._values < _FEW:
            return
        values = ", ".join(sorted({f"{value:g}" for value in map(float, self._known or [])}))
        raise ValueError(
            f"ds holds no data: each of its {self._values} values is {values}. A loader that fails "
            "silently gives that (a path that does not exist, a decoder's zeros, a division of "
            "integers); look at a batch, and calibrate on samples as the model will be served"
        )


def _is_key(x: Any) -> bool:
    return prng.is_key_dtype(x.dtype)


def _here(x: Any) -> Any:
    """An input in NumPy, but for an array on other devices than one CPU, which stays there."""
    is_elsewhere = isinstance(x, jax.Array) and (
        len(x.devices()) > 1 or any(device.platform != "cpu" for device in x.devices())
    )
    return x if is_elsewhere else np.asarray(x)
