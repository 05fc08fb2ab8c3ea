"""What is found of a network while its graphs are gone through."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from jaxquant.deploy.network import Node, Slice, Tensor
from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_suffix


@dataclasses.dataclass
class Found:
    """What is found of a network, by its model's own graph and by those of its bodies.

    `operators` are the kinds that are looked for (`jaxquant.graph.operators`); `folded` is where
    the constants of a body are, which all its steps share; the rest are the attributes of a
    `Network` of these names.
    """

    operators: Collection[str] = ()
    tensors: list[Tensor] = dataclasses.field(default_factory=list)
    moves: list[Node] = dataclasses.field(default_factory=list)
    entries: dict[str, str] = dataclasses.field(default_factory=dict)
    scales: dict[str, str] = dataclasses.field(default_factory=dict)
    rounded: set[int] = dataclasses.field(default_factory=set)
    leaves: dict[str, str] = dataclasses.field(default_factory=dict)
    constants: dict[str, str] = dataclasses.field(default_factory=dict)
    slices: dict[str, Slice] = dataclasses.field(default_factory=dict)
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    folded: dict[tuple[tuple[int, ...], ir.Var], str] = dataclasses.field(default_factory=dict)

    def new(self, tensor: Tensor) -> int:
        """The number of another tensor."""
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def slice_of(self, name: str, index: tuple[int, ...]) -> str:
        """The name of an entry of an array; a "~" before a bracket is in no other name."""
        if not index:
            return name
        part = f"{name}~{layer_suffix(index)}"
        self.slices[part] = Slice(name, index)
        return part
