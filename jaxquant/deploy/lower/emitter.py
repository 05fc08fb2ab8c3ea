"""What the emitters of all formats have in common: the tensors so far, and stored weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar

from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.model import Lowered
from jaxquant.deploy.lower.stored import Stored, read
from jaxquant.deploy.lower.values import Size, Value
from jaxquant.deploy.network import Node, Var

# These take an operand whose broadcast is put off; other operations that move get the copies.
LAZY = frozenset({"broadcast_in_dim", "squeeze", "transpose"})


class Writing(Protocol):
    """What writes a graph.

    Attributes:
      scope: what is written next belongs to it.
    """

    scope: str

    def expanded(self, value: Value, shape: Sequence[Size]) -> Value: ...


B = TypeVar("B", bound=Writing)


class BaseEmitter(Generic[B]):
    """The float values and the int8 forms of a network's tensors, and weights as they are stored.

    Args:
      model: what is exported.
      builder: of the graph.

    Attributes:
      function: which users call, for messages.
    """

    function: ClassVar[str]

    def __init__(self, model: Lowered, builder: B) -> None:
        self.model = model
        self.network = model.network
        self.builder = builder
        self._floats: dict[Var, Value] = {}
        self._int8: dict[Var, Value] = {}
        self._weights: dict[Var, Stored] = {}  # until something reads them in float

    def set_input(self, var: Var, value: Value) -> None:
        self._floats[var] = value

    def full(self, value: Value, var: Var) -> Value:
        """The value with all copies that the tensor holds."""
        return self.builder.expanded(value, self.shape(var))

    def shape(self, var: Var) -> tuple[Size, ...]:
        return self.network.tensors[var].shape

    def _copied(
        self, node: Node, values: Sequence[Value], places: Sequence[int] | None = None
    ) -> list[Value]:
        """The operands, or those at some places, with all copies that they hold."""
        atoms = node.inputs if places is None else [node.inputs[place] for place in places]
        return [
            self.full(value, x) if isinstance(x, int) and value.shape != self.shape(x) else value
            for value, x in zip(values, atoms, strict=True)
        ]

    @contextlib.contextmanager
    def _at(self, scope: str, where: str) -> Iterator[None]:
        """Name what is emitted inside, and what is not covered."""
        outer, self.builder.scope = self.builder.scope, scope
        try:
            yield
        except NotCovered as error:
            # The user's own line is what helps: the exporter's frames are left away.
            raise ValueError(f"{self.function} does not cover {error} ({where})") from None
        finally:
            self.builder.scope = outer

    def _is_weight(self, node: Node) -> bool:
        """Take a stored weight, or its transpose, as it is: what reads it may have a form of it."""
        weight = None
        if node.op == "dequantize":
            weight = self._stored(node)
        elif node.op == "transpose" and node.inputs[0] in self._weights:
            weight = self._weights[node.inputs[0]].transposed(node.params["permutation"])
        if weight is not None:
            # Nothing is written yet: how, its first reader tells.
            self._weights[node.outputs[0]] = weight
        return weight is not None

    def _stored(self, node: Node) -> Stored:
        """What is stored for the weight that an operation reads first."""
        integers, scale = (self.model.arrays[self.network.leaves[str(x)]] for x in node.inputs[:2])
        return read(integers, scale, node.params["groups"], node.params["bits"])
