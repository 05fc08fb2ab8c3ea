"""The int8 network as plain data: its operations, int8 forms and epilogues, without JAX.

Exporters read it.  The arrays are in `qparams` and in `constants`, by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.graph.contraction import Contraction

Var = int  # a tensor: an index into Network.tensors


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A number written into an operation; `value` is text where JSON has no such number."""

    value: bool | int | float | str
    dtype: str

    def array(self) -> np.ndarray:
        return np.asarray(float(self.value) if isinstance(self.value, str) else self.value)


Atom = Var | Scalar


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Shape and dtype; a size that varies is the text of its expression, such as "batch"."""

    shape: tuple[int | str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Node:
    """One operation, by the name and the parameters of its JAX primitive.

    Where JAX writes several, they are those of a kind of `jaxquant.graph.operators`.  "dequantize"
    is none of either: a weight in float of its stored integers and their scales, with its `groups`
    and `bits`.

    `reads_int8` tells that operands with an int8 form are read dequantized; `picks` that the
    result is int8 and this is its dequantized value.  `bodies` are those of a loop or a choice.
    `contraction` says what a convolution or dot does with the axes of its operands; None of others.
    `source` is where the model says so, as "file.py:12"; "" where that is not known.
    """

    op: str
    inputs: tuple[Atom, ...]
    outputs: tuple[Var, ...]
    params: Mapping[str, Any]
    scope: str
    reads_int8: bool = False
    picks: bool = False
    bodies: tuple[Body, ...] = ()
    contraction: Contraction | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Body:
    """What a loop repeats, or a branch: a graph of its own, over the tensors of the network.

    Attributes:
      key: the parameter of the JAX primitive that it is, such as "cond_jaxpr".
      inputs: what the operation sets before the nodes run.
      nodes: its operations, in order, int8 sites among them.
      outputs: what it gives.
    """

    key: str
    inputs: tuple[Var, ...]
    nodes: tuple[Node | Int8Node, ...]
    outputs: tuple[Atom, ...]


@dataclasses.dataclass(frozen=True)
class Int8Node:
    """An accumulating int8 site, up to the end of its epilogue.

    Attributes:
      name, kind: of the site; in an unrolled scan the name ends in the layer, "[3]".
      node: its operation; the outputs are those of the float operation.
      operands: the int8 tensors that it reads; where it is dynamic, tensors in float.
      weight: the name of its int8 weight in `qparams`, "" where it has none stored.
      computed_weight: a weight that is quantized on the way, from this constant; else None.
      weight_position: the weight's place among the operands.
      weight_axes: the axes of the weight that run along output channels.
      movements: the operations that rearrange the accumulator before multiplier and bias.
      channel_sizes, channel_axes: where the channels are in the tensor that these give.
      output: the tensor at the end of the epilogue.
      dynamic: its operands get their scales in each call.
      asymmetric: and the rows of its input their zero points.
    """

    name: str
    kind: str
    node: Node
    operands: tuple[Var, ...]
    weight: str
    computed_weight: Var | None
    weight_position: int
    weight_axes: tuple[int, ...]
    movements: tuple[Node, ...]
    channel_sizes: tuple[int, ...]
    channel_axes: tuple[int, ...]
    output: Var
    dynamic: bool
    asymmetric: bool


@dataclasses.dataclass(frozen=True)
class Slice:
    """An entry of an array along its first axes: of stacked weights those of a layer."""

    array: str
    index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """An int8 network.

    Attributes:
      tensors: shape and dtype of every tensor.
      inputs, outputs: the flattened inputs and outputs.
      input_names, output_names: their paths in their containers.
      nodes: what runs in float, int8 sites among them, in order.
      moves: the operations that hand int8 values on; they run where their result is read.
      entries: tensor (its number, as text) -> the entry of `qparams["tensors"]` that quantizes it.
      scales: int8 tensor (likewise) -> the entry that says what its values are worth.
      rounded: the tensors that are quantized for everybody: their float is what int8 stands for.
      leaves: tensor (likewise) -> the name of the float array in `qparams`.
      constants: tensors (likewise) that depend on no parameter -> the name of their array.
      slices: names of arrays that are a part of one with another name, each behind its own.
    """

    tensors: tuple[Tensor, ...]
    inputs: tuple[Var, ...]
    outputs: tuple[Atom, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    nodes: tuple[Node | Int8Node, ...]
    moves: tuple[Node, ...]
    entries: Mapping[str, str]
    scales: Mapping[str, str]
    leaves: Mapping[str, str]
    constants: Mapping[str, str]
    slices: Mapping[str, Slice]
    rounded: frozenset[Var] = frozenset()

    def walk(self) -> Iterator[Node | Int8Node]:
        """What runs, with what runs in the bodies of loops and choices."""
        yield from _walk(self.nodes)


def _walk(nodes: Sequence[Node | Int8Node]) -> Iterator[Node | Int8Node]:
    for node in nodes:
        yield node
        for body in node.bodies if isinstance(node, Node) else ():
            yield from _walk(body.nodes)
