"""Scans cut into segments: several scans one after the other in place of one over all layers.

Layers that are quantized unlike others have a scan of their own, so that each scan has one program
for all its layers.  What is cut are the parameters that a scan goes over: the array "a/kernel" of
12 layers becomes "a[0:3]/kernel", "a[3]/kernel" and "a[4:12]/kernel", and the scan three, each over
its own arrays; a name tells of which layers it is.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax import lax

from jaxquant.graph import ir
from jaxquant.graph import trace as tracing
from jaxquant.graph.marks import mark
from jaxquant.graph.rewriting import Rewriting
from jaxquant.jax_shim import jaxprs

# Path of a parameter -> where it is cut: the first layers of its segments, and how many there are.
Cuts: TypeAlias = Mapping[str, tuple[int, ...]]
_COLLECTION = "params"


def cut_tree(params: Any, cuts: Cuts, cut: Any) -> Any:
    """A pytree of parameters, or of something for each, with those that are cut in pieces.

    Args:
      params: the pytree.
      cuts: where.
      cut: (leaf, bounds) -> its pieces.

    Returns:
      A nested dict by the paths; the pytree itself where nothing is cut.
    """
    if not cuts:
        return params
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        # By paths as the model's own: linen's, nnx's and plain trees become nested dicts alike.
        parts = tracing.path_parts(path)
        bounds = cuts.get("/".join(parts))
        if bounds is None:
            _put(tree, parts, leaf)
            continue
        for piece, (start, stop) in zip(cut(leaf, bounds), itertools.pairwise(bounds), strict=True):
            _put(tree, _marked(parts, mark(start, stop)), piece)
    return tree


def _marked(parts: Sequence[str], text: str) -> tuple[str, ...]:
    """The path of a piece: its module has the mark, or it itself where it is in none."""
    *modules, leaf = parts
    # linen's collection is no module, and stays first in the path.
    if not modules or modules == [_COLLECTION]:
        return (*modules, leaf + text)
    return (*modules[:-1], modules[-1] + text, leaf)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def pieces(leaf: Any, bounds: Sequence[int]) -> list[Any]:
    """The pieces of an array, or the shapes of those of its shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        sizes = np.diff(bounds)
        return [leaf.update(shape=(int(size), *leaf.shape[1:])) for size in sizes]
    return [leaf[start:stop] for start, stop in itertools.pairwise(bounds)]


@dataclasses.dataclass(frozen=True)
class Segment:
    """An equation of a graph that was cut.

    Attributes:
      equation: the index of the one that it was in the graph before.
      start: of a segment of a scan, its first layer; else 0.
      joins: it puts pieces together, and was not there before.
    """

    equation: int
    start: int = 0
    joins: bool = False


class _Cutting(Rewriting):
    """The graph that is made of one."""

    def __init__(self, graph: ir.Graph, params: Any, cuts: Cuts) -> None:
        super().__init__(graph)
        self.cuts = cuts
        self.paths = dict(graph.paths)
        self.origins: dict[int, Segment] = {}
        self.pieces: dict[ir.Var, list[ir.Var]] = {}
        self._whole: dict[ir.Var, ir.Var] = {}

        structure = jax.tree.structure(params)
        tree = cut_tree(jax.tree.unflatten(structure, graph.leaves), cuts, self._cut_leaf)
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        self.leaves = tuple(var for _, var in flat)
        self.paths.update({var: tracing.path_name(path) for path, var in flat})
        # The whole is no parameter any more.
        for var in self.pieces:
            del self.paths[var]

    def _cut_leaf(self, var: ir.Var, bounds: Sequence[int]) -> list[ir.Var]:
        found = pieces(jax.ShapeDtypeStruct(self.graph.shape(var), self.graph.dtype(var)), bounds)
        avals = [self.avals[var].update(shape=piece.shape) for piece in found]
        self.pieces[var] = [self.new(aval, static=True) for aval in avals]
        return self.pieces[var]

    def _sized(self, var: ir.Var, length: int) -> ir.Var:
        """A tensor like another one with so many layers."""
        aval = self.avals[var]
        shape = (length, *aval.shape[1:])
        return self.new(aval.update(shape=shape), static=self.static[var])

    def _add(self, eqn: ir.Equation, origin: Segment, **changes: Any) -> None:
        self.origins[self.add(eqn, **changes)] = origin

    def whole(self, atom: ir.Atom, near: ir.Equation) -> ir.Atom:
        """An atom that is read whole, put together where it is cut."""
        if not isinstance(atom, int) or atom not in self.pieces:
            return atom
        # Put together at most once, where the first reader is.
        if atom not in self._whole:
            self._whole[atom] = self.new(self.avals[atom], static=True)
            self._join(self.pieces[atom], self._whole[atom], near)
        return self._whole[atom]

    def _join(self, parts: Sequence[ir.Var], into: ir.Var, near: ir.Equation) -> None:
        self._add(
            near,
            Segment(near.index, joins=True),
            primitive=lax.concatenate_p,
            inputs=tuple(parts),
            outputs=(into,),
            params={"dimension": 0},
        )

    def cut(self, eqn: ir.Equation) -> None:
        """Take over an equation of the graph before."""
        scanned = scanned_operands(eqn)
        bounds = next((self.bounds(x) for x in scanned if x in self.pieces), None)
        if bounds is not None:
            self._cut_scan(eqn, bounds)
            return
        # An equation that reads a cut parameter whole, such as a norm of it, gets it put together.
        inputs = tuple(self.whole(atom, eqn) for atom in eqn.inputs)
        self._add(eqn, Segment(eqn.index), inputs=inputs)

    def bounds(self, leaf: ir.Var) -> tuple[int, ...]:
        return self.cuts[self.graph.paths[leaf]]

    def _slices(self, atom: ir.Atom, bounds: Sequence[int], near: ir.Equation) -> list[ir.Var]:
        """What the segments of a scan read of an operand that they go over."""
        assert isinstance(atom, int)
        # A parameter has its pieces.
        if atom in self.pieces:
            return self.pieces[atom]
        found = []
        for start, stop in itertools.pairwise(bounds):
            found.append(self._sized(atom, stop - start))
            rest = self.graph.shape(atom)[1:]
            # Parameters have pieces already; anything else that the scan goes over is sliced here.
            limits = {"start_indices": (start, *(0 for _ in rest)), "limit_indices": (stop, *rest)}
            self._add(
                near,
                Segment(near.index),
                primitive=lax.slice_p,
                inputs=(atom,),
                outputs=(found[-1],),
                params={**limits, "strides": None},
            )
        return found

    def _cut_scan(self, eqn: ir.Equation, bounds: Sequence[int]) -> None:
        constants, carried = jaxprs.scan_counts(eqn.params)
        # What all steps read is the same in every segment.
        fixed = [self.whole(x, eqn) for x in eqn.inputs[:constants]]
        carry = [self.whole(x, eqn) for x in eqn.inputs[constants : constants + carried]]
        sliced = [self._slices(x, bounds, eqn) for x in eqn.inputs[constants + carried :]]

        # A scan for each span, which starts with the carry that the one before it ends with; a scan
        # backwards begins with the last span.
        spans = list(itertools.pairwise(bounds))
        parts: list[list[ir.Var]] = [[] for _ in eqn.outputs[carried:]]
        order = list(enumerate(spans))
        backwards = bool(eqn.params["reverse"])
        for place, (start, stop) in reversed(order) if backwards else order:
            is_last = place == (0 if backwards else len(spans) - 1)
            ends = eqn.outputs[:carried]  # only the last scan to run gives what others read
            # Other scans hand their carry to the next alone.
            after = ends if is_last else [self.new(self.avals[v], static=False) for v in ends]
            stacked = [self._sized(v, stop - start) for v in eqn.outputs[carried:]]
            for part, var in zip(parts, stacked, strict=True):
                part.insert(0, var) if backwards else part.append(var)
            length = stop - start
            self._add(
                eqn,
                Segment(eqn.index, start),
                inputs=(*fixed, *carry, *(each[place] for each in sliced)),
                outputs=(*after, *stacked),
                params={
                    **eqn.params, "length": length, "unroll": min(eqn.params["unroll"], length),
                },
            )  # fmt: skip
            carry = list(after)

        # What the steps stack is one tensor again for whoever reads it.
        for part, var in zip(parts, eqn.outputs[carried:], strict=True):
            self._join(part, var, eqn)


def scanned_operands(eqn: ir.Equation) -> tuple[ir.Var, ...]:
    """What a scan goes over; () for another equation."""
    if eqn.name != "scan":
        return ()
    constants, carried = jaxprs.scan_counts(eqn.params)
    return tuple(x for x in eqn.inputs[constants + carried :] if isinstance(x, int))


def cut_graph(graph: ir.Graph, params: Any, cuts: Cuts) -> tuple[ir.Graph, Mapping[int, Segment]]:
    """A graph with scans over parameters cut into segments.

    Its tensors keep their numbers.  A parameter that something else reads too is put together for
    it.

    Args:
      graph: of a whole model.
      params: its parameters or their shapes.
      cuts: where; the same for all parameters that one scan goes over.

    Returns:
      The graph, whose leaves are those of `cut_tree`; and for its equations what they were before.
    """
    cutting = _Cutting(graph, params, cuts)
    for eqn in graph.equations:
        cutting.cut(eqn)
    # No reader is near an output, so the last equation stands for it.
    last = graph.equations[-1]
    # A stack that the model gives is put together of the segments' stacks.
    outputs = tuple(cutting.whole(x, last) for x in graph.outputs)
    found = cutting.done(leaves=cutting.leaves, outputs=outputs, paths=cutting.paths)
    return found, cutting.origins
