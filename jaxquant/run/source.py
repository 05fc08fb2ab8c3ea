"""What a quantized model is made of: its code, or what a file holds of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from jaxquant.graph import ir
from jaxquant.graph.cuts import Cuts, cut_tree, pieces
from jaxquant.graph.model import Model, trace_model


class Source(Protocol):
    """What a model is: its code, or what a file holds of it.

    Attributes:
      params: shapes and dtypes of the parameters, before any is quantized.
    """

    params: Any

    def __call__(self, inputs: Sequence[Any]) -> Model:
        """The float model for inputs of these shapes and dtypes.

        Raises:
          ValueError: the model does not take such inputs.
        """
        ...

    def input_shapes(self, inputs: tuple[Any, ...]) -> tuple[str, ...]:
        """The dtypes and shapes of the inputs, those with which the model was quantized given."""
        ...


class Code:
    """A model as a function of its parameters and inputs, its scans cut as the plan says."""

    def __init__(self, apply_fn: Callable[..., Any], params: Any, cuts: Cuts | None = None) -> None:
        self._given = jax.tree.map(ir.struct, params)
        self._cuts: Cuts = cuts or {}
        self.params = cut_tree(self._given, self._cuts, pieces)
        self._apply_fn = apply_fn

    def __call__(self, inputs: Sequence[Any]) -> Model:
        return trace_model(self._apply_fn, self._given, inputs, self._cuts)

    def input_shapes(self, inputs: tuple[Any, ...]) -> tuple[str, ...]:
        return tuple(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(inputs))
