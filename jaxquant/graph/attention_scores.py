"""What lies between the two dots of an attention, taken apart: the scores, and their weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxquant.graph import copies, ir, matching, primitives
from jaxquant.graph.contraction import DOT, Axes, Contraction

Order: TypeAlias = tuple[int, ...]


class Addend(NamedTuple):
    """A tensor beside the scores, of their shape but for axes of size 1.

    Attributes:
      axes: where it has the axes of the scores: of the batch, the keys, the rows.
      varying: those of them along which its values may differ.
      negated: of a mask, whether a score stays where it is False.
    """

    axes: tuple[int, ...]
    varying: frozenset[int]
    negated: bool = False


class Weights:
    """What the second dot reads of a softmax, behind casts and without axes of size 1.

    `jnp.matmul` takes those of a batch of one out, and puts them back behind the dot.

    Attributes:
      source: what the softmax gives.
      axes: of the dot's operand, as the softmax's result has them.
      members: the equations between.
    """

    def __init__(self, graph: ir.Graph, operand: ir.Atom, axes: Axes) -> None:
        self.source, self.members = operand, set[int]()
        kept = tuple(range(len(graph.shape(operand))))
        while (eqn := matching.producer(graph, self.source)) is not None:
            # What JAX takes out here it puts back behind the dot, so both are seen through.
            if eqn.name == "squeeze":
                gone = eqn.params["dimensions"]
                there = [a for a in range(len(graph.shape(eqn.inputs[0]))) if a not in gone]
                kept = tuple(there[axis] for axis in kept)
            elif not matching.is_float_cast(graph, eqn):
                break
            self.members.add(eqn.index)
            self.source = eqn.inputs[0]
        parts = dataclasses.astuple(axes)
        self.axes = Axes(*(tuple(kept[axis] for axis in part) for part in parts))


class Scores:
    """What a softmax reads, taken apart from behind: masks, biases, factors, the product.

    Attributes:
      product: the dot of q and k; None where there is none.
      contraction: its axes.
      biases: what is added to the scores.
      masks: by which they are replaced.
      members: the equations.
    """

    def __init__(self, graph: ir.Graph, scores: ir.Var) -> None:
        self._graph = graph
        self._scale, self._fill = 1.0, 0.0
        # The axes of what the softmax reads, in the order in which a tensor before it has them.
        self._order = tuple(range(len(graph.shape(scores))))
        self.biases: dict[ir.Var, Order] = {}
        self.masks: dict[ir.Var, Order] = {}
        self._negated: set[ir.Var] = set()
        self.members: set[int] = set()
        self.product: ir.Equation | None = None
        self.contraction: Contraction | None = None
        eqn = graph.producer.get(scores)
        # From the softmax back to the product, as long as each equation is one that a kernel does
        # as well.
        while eqn is not None and not graph.static[eqn.outputs[0]]:
            self.members.add(eqn.index)
            if eqn.index in graph.contractions:
                contraction = graph.contractions[eqn.index]
                if is_plain(graph, eqn, contraction):
                    self.product, self.contraction = eqn, contraction
                return
            before = self._before(eqn)
            # Sizes in any order: transposes keep them, a repetition of the scores does not.
            if before is None or len({_elements(graph, x) for x in (before, *eqn.outputs)}) != 1:
                return  # what is beside them repeats the scores along an axis of size 1
            eqn = matching.producer(graph, before)

    def before_moves(self, axes: Axes) -> Axes | None:
        """Axes of what the softmax gives as those of the product; None where it lacks one."""
        parts = dataclasses.astuple(axes)
        if not {axis for part in parts for axis in part} <= {*self._order}:
            return None
        return Axes(*(tuple(self._order.index(axis) for axis in part) for part in parts))

    def rows(self, keys: int) -> list[int]:
        """The free axes of the operand without the keys in the order in which a layout has them.

        Kernels go along the last one, so it is the longest.
        """
        assert self.contraction is not None
        assert self.product is not None
        shape = self._graph.shape(self.product.outputs[0])
        sizes = [shape[axis] for axis in self.contraction.result.free[1 - keys]]
        # A length that varies is taken for the longest.
        lengths = [size if isinstance(size, int) else math.inf for size in sizes]
        return sorted(range(len(sizes)), key=lengths.__getitem__)

    def params(self, keys: int, batch: Order) -> dict[str, Any]:
        """What is done to the products, of which an operand has the keys.

        Args:
          keys: which operand.
          batch: the batch axes that count.
        """
        assert self.contraction is not None
        result = self.contraction.result
        *others, rows = [result.free[1 - keys][k] for k in self.rows(keys)]
        # Biases and masks are read by the order of the scores as the product gives them.
        wanted = [self._order[axis] for axis in (*batch, *others, *result.free[keys], rows)]

        def addends(found: Mapping[ir.Var, Order]) -> tuple[Addend, ...]:
            return tuple(
                Addend(
                    tuple(order.index(axis) for axis in wanted),
                    _varying(self._graph, var),
                    var in self._negated,
                )
                for var, order in found.items()
            )

        return {
            "scale": self._scale,
            "fill": self._fill,
            "biases": addends(self.biases),
            "masks": addends(self.masks),
        }

    def _before(self, eqn: ir.Equation) -> ir.Atom | None:
        """The scores that an equation changes; None where a kernel cannot do as it does."""
        if matching.is_float_cast(self._graph, eqn):
            return eqn.inputs[0]
        if eqn.name == "transpose":
            # Its axis k is the one before it that the permutation has there.
            moved = tuple(eqn.params["permutation"])
            self._order = tuple(self._order[moved.index(axis)] for axis in range(len(moved)))
            return eqn.inputs[0]
        if eqn.name == "broadcast_in_dim":
            return self._without_ones(eqn)
        if eqn.name == "select_n" and len(eqn.inputs) == 3:
            return self._masked(eqn)
        # A kernel adds biases behind the scale; one that is scaled with the products is another
        # one.
        if eqn.name == "add" and self._scale == 1.0:
            return self._biased(eqn)
        if eqn.name not in ("mul", "div"):
            return None
        # Of a quotient the number has to be what divides.
        for place in (0, 1) if eqn.name == "mul" else (1,):
            number = matching.spread_number(self._graph, eqn.inputs[place])
            if number is not None and (number or eqn.name == "mul"):
                self._scale *= number if eqn.name == "mul" else 1 / number
                return eqn.inputs[1 - place]
        return None

    def _without_ones(self, eqn: ir.Equation) -> ir.Atom | None:
        """The scores without axes of size 1 that an equation gives them."""
        if not _adds_ones(self._graph, eqn):
            return None
        self._order = tuple(self._order[axis] for axis in eqn.params["broadcast_dimensions"])
        return eqn.inputs[0]

    def _masked(self, eqn: ir.Equation) -> ir.Atom | None:
        if self.biases or self._scale != 1.0:
            return None  # those come before a mask, seen from the product
        mask, *values = eqn.inputs
        if not isinstance(mask, int) or self._graph.dtype(mask) != jnp.bool_:
            return None
        # `where(mask, scores, fill)` or the other way round, in which case the mask is negated.
        for place in (0, 1):
            number = matching.spread_number(self._graph, values[place])
            # Several masks are one where they write one number.
            if number is not None and (not self.masks or number == self._fill):
                if mask in self.masks or self._graph.shape(mask) != self._graph.shape(values[0]):
                    return None
                self.masks[mask], self._fill = self._order, number
                if place == 1:
                    self._negated.add(mask)
                return values[1 - place]
        return None

    def _biased(self, eqn: ir.Equation) -> ir.Atom | None:
        """The bias is the addend that comes of no dot, or a number."""
        for place in (0, 1):
            bias = eqn.inputs[place]
            # Sizes of 1 need not be spread first.
            if not isinstance(bias, int) or len(self._graph.shape(bias)) != len(self._order):
                continue
            # Of two addends the bias is the one that no dot of q and k leads to.
            if bias not in self.biases and not self._leads_to_product(bias):
                self.biases[bias] = self._order
                return eqn.inputs[1 - place]
        return None

    def _leads_to_product(self, atom: ir.Atom) -> bool:
        """Whether scores come from here, by way of what this class takes apart."""
        while (eqn := matching.producer(self._graph, atom)) is not None:
            if eqn.index in self._graph.contractions:
                return True
            if matching.is_float_cast(self._graph, eqn) or _adds_ones(self._graph, eqn):
                atom = eqn.inputs[0]
                continue
            if eqn.name not in ("mul", "div", "add", "transpose") or self._graph.is_static(atom):
                return False
            others = [x for x in eqn.inputs if not self._graph.is_static(x)]
            if len(others) != 1:
                # A sum of two tensors is as much of the one as of the other.
                return eqn.name == "add"
            atom = others[0]
        return False


def is_plain(graph: ir.Graph, eqn: ir.Equation, contraction: Contraction) -> bool:
    """True for a dot of two tensors, of float32 or bfloat16, over one axis of each."""
    atoms = (*eqn.inputs, *eqn.outputs)
    return (
        eqn.name == DOT
        and all(graph.dtype(x) in (jnp.float32, jnp.bfloat16) for x in atoms)
        and all(isinstance(x, int) for x in eqn.inputs)
        and len(contraction.operands[0].contracted) == 1
    )


def _adds_ones(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where an equation gives a tensor axes of size 1, and copies nothing."""
    if eqn.name != "broadcast_in_dim" or not isinstance(eqn.inputs[0], int):
        return False
    shape, places = graph.shape(eqn.outputs[0]), eqn.params["broadcast_dimensions"]
    # What is not placed is new.
    added = [size for axis, size in enumerate(shape) if axis not in places]
    kept = tuple(shape[place] for place in places)
    return graph.shape(eqn.inputs[0]) == kept and all(size == 1 for size in added)


def _elements(graph: ir.Graph, atom: ir.Atom) -> tuple[Any, ...]:
    """The sizes of a tensor in any order, those of 1 apart."""
    return tuple(sorted((size for size in graph.shape(atom) if size != 1), key=str))


def _varying(graph: ir.Graph, atom: ir.Atom) -> frozenset[int]:
    """The axes along which a tensor's values may differ, static or not."""
    if graph.is_static(atom):
        return copies.varying_axes(graph, atom)
    eqn, sizes = matching.producer(graph, atom), graph.shape(atom)
    wide = frozenset(axis for axis, size in enumerate(sizes) if size != 1)
    if eqn is not None and eqn.name in ("broadcast_in_dim", "transpose", "reshape"):
        return wide & primitives.follow_axes(graph, eqn, _varying(graph, eqn.inputs[0]))
    if eqn is not None and primitives.is_elementwise(eqn):
        # A scalar varies along nothing; of operands of a size of 1, the others vary along it.
        alike = [x for x in eqn.inputs if len(graph.shape(x)) == len(sizes)]
        return wide & frozenset().union(*(_varying(graph, x) for x in alike))
    return wide
