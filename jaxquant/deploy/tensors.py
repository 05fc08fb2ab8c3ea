"""The tensors of one graph as those of a network."""

from __future__ import annotations

from typing import Any

from jaxquant.deploy.found import Found
from jaxquant.deploy.network import Atom, Int8Node, Node, Tensor
from jaxquant.deploy.plain_values import scalar
from jaxquant.graph import ir
from jaxquant.graph.regions import Region
from jaxquant.jax_shim import jaxprs, prng


class Tensors:
    """Numbers the tensors of a graph, each where it is named first.

    Args:
      region: the graph as one of the model's.
      found: what is translated so far of the whole network.
      nodes: where the operations go.
    """

    def __init__(self, region: Region, found: Found, nodes: list[Node | Int8Node]) -> None:
        self.region = region
        self.graph = region.graph
        self.found = found
        self.nodes = nodes
        self._numbers: dict[ir.Var, int] = {}
        self._unstacked: dict[ir.Var, tuple[int, ...]] = {}

    def number(self, var: ir.Var) -> int:
        """The number of a tensor, which it gets where it is named first."""
        if var not in self._numbers:
            self._numbers[var] = self.new(self.graph, var)
        return self._numbers[var]

    def outputs(self) -> tuple[Atom, ...]:
        """What the graph gives."""
        return tuple(self.atom(x) for x in self.graph.outputs)

    def atom(self, atom: ir.Atom) -> Atom:
        """The number of a tensor, or the value of a literal."""
        return scalar(atom.value) if isinstance(atom, ir.Literal) else self.number(atom)

    def new(self, graph: ir.Graph, var: ir.Var) -> int:
        """A number for a tensor of a graph, this one or another.

        Raises:
          ValueError: it is a PRNG key; the message says where it is from.
        """
        if prng.is_key_dtype(graph.dtype(var)):
            raise _random(graph, var)
        shape = tuple(d if isinstance(d, int) else str(d) for d in graph.shape(var))
        return self.found.new(Tensor(shape, str(graph.dtype(var))))

    def alias(self, var: ir.Var, atom: Atom) -> None:
        """Add that a tensor of this graph is one of another, whose int8 form may be another."""
        self.add("optimization_barrier", (atom,), (self.number(var),), {})

    def add(
        self, op: str, inputs: tuple[Atom, ...], outputs: tuple[int, ...], params: dict[str, Any]
    ) -> None:
        """Add an operation that no equation of the graph is."""
        scope = "" if self.region.equation is None else self.region.equation.scope
        self.nodes.append(Node(op, inputs, outputs, params, scope))

    def unstack(self, atom: ir.Atom) -> tuple[int, ...]:
        """The numbers of the entries of a tensor along its first axis, which is added once."""
        assert isinstance(atom, int), "what a scan goes along is no scalar"
        # Once for all steps: each reads its own entry.
        if atom not in self._unstacked:
            tensor = self.found.tensors[self.number(atom)]
            length = int(tensor.shape[0])
            entry = Tensor(tensor.shape[1:], tensor.dtype)
            self._unstacked[atom] = tuple(self.found.new(entry) for _ in range(length))
            numbers = self._unstacked[atom]
            self.add("unstack", (self.number(atom),), numbers, {"axis": 0})
        return self._unstacked[atom]


def _random(graph: ir.Graph, key: ir.Var) -> ValueError:
    """What tells that a key has no place in a network, and what has."""
    where = "an input, a constant or what a loop carries"
    if (eqn := graph.producer.get(key)) is not None:
        where = f"the operation {eqn.name!r}" + (f" in {eqn.scope!r}" if eqn.scope else "")
        line = jaxprs.line_of(eqn.source_info)
        where += f", {line}" if line else ""
    return ValueError(
        f"the model draws random numbers by a PRNG key ({where}), and ONNX has no operations that "
        "give the numbers of jax.random. Export what gives the logits, such as one step of the "
        "loop, quantized by itself, and draw where the file is run, or take what is likeliest. "
        "jaxquant.save_quantized_model and export_stablehlo keep the model as it is"
    )
