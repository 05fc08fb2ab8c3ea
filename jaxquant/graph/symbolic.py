"""Graphs with symbolic sizes: the same operations as with numbers.

Where a size is symbolic, `jax.numpy` indexes with a gather of computed indices what it slices
otherwise: `x[:, 0, ::2]`.  Here such a gather becomes a slice, so that a model has the same sites
for every batch size; in graphs with numbers too, where a model itself gathers by `jnp.arange`.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np

from jaxquant.graph import evaluate, ir, kinds
from jaxquant.graph.rewriting import Rewriting


def at_least(size: Any, least: Any) -> bool | None:
    """Whether a size is at least so large; None where it is a symbol that may be either."""
    try:
        return bool(size >= least)
    except jax.errors.InconclusiveDimensionOperation:
        return None


def restore_slices(graph: ir.Graph) -> ir.Graph:
    """The graph with a slice, and a squeeze, for every gather that is one.

    Those of `jax.image.resize` stay: they are gathers whatever the sizes, and a kind of their own.
    """
    return _Restorer(graph).restored()


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A gather as a slice; `dropped` are the axes with a single index."""

    starts: tuple[int, ...]
    limits: tuple[Any, ...]
    strides: tuple[int, ...]
    dropped: tuple[int, ...]


class _Restorer(Rewriting):
    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self._same: dict[ir.Var, ir.Atom] = {}

    def restored(self) -> ir.Graph:
        for eqn in self.graph.equations:
            inputs = tuple(self._atom(x) for x in eqn.inputs)
            # JAX indexes by gathers where a size is a symbol; a resize gathers by intent, and
            # stays.
            is_index = eqn.name == "gather" and kinds.RESIZE_CALL not in eqn.calls
            found = _as_slice(self.graph, eqn) if is_index else None
            if found is None:
                self.add(eqn, inputs=inputs)
            else:
                self._slice(eqn, inputs[0], found)
        return self.done(outputs=tuple(self._atom(x) for x in self.graph.outputs))

    def _atom(self, atom: ir.Atom) -> ir.Atom:
        return self._same.get(atom, atom) if isinstance(atom, int) else atom

    def _slice(self, eqn: ir.Equation, operand: ir.Atom, found: _Slice) -> None:
        (output,), shape = eqn.outputs, self.graph.shape(eqn.inputs[0])
        whole = not any(found.starts) and set(found.strides) <= {1} and found.limits == shape
        if whole and not found.dropped:
            # A slice of everything is the tensor itself.
            self._same[output] = operand
            return
        squeeze = {"dimensions": found.dropped}
        if whole:
            self.add(eqn, primitive=jax.lax.squeeze_p, inputs=(operand,), params=squeeze)
            return
        target = output
        if found.dropped:
            pairs = zip(found.starts, found.limits, found.strides, strict=True)
            # The axes that an index drops are sliced to size 1 first, then squeezed away.
            # As many indices as steps reach: the last one counts.
            sizes = tuple((limit - start - 1) // stride + 1 for start, limit, stride in pairs)
            target = self.new(self.graph.avals[output].update(shape=sizes))
        strides = found.strides if set(found.strides) != {1} else None
        params = {"start_indices": found.starts, "limit_indices": found.limits, "strides": strides}
        self.add(
            eqn, primitive=jax.lax.slice_p, inputs=(operand,), outputs=(target,), params=params
        )
        if found.dropped:
            self.add(eqn, primitive=jax.lax.squeeze_p, inputs=(target,), params=squeeze)


def _as_slice(graph: ir.Graph, eqn: ir.Equation) -> _Slice | None:
    """The slice that a gather is; None where it picks something else."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indices = _known_indices(graph, eqn.inputs[1])
    # A gather of parameters is a lookup, which stays one.
    if indices is None or numbers.operand_batching_dims or graph.is_static(eqn.inputs[0]):
        return None
    shape = graph.shape(eqn.inputs[0])
    rank = len(graph.shape(eqn.outputs[0]))
    batch_axes = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    kept = [a for a in range(len(shape)) if a not in numbers.collapsed_slice_dims]
    placed = dict(zip(kept, numbers.offset_dims, strict=True))  # operand axis -> axis of the result
    cuts: list[tuple[int, Any, int]] = []
    single: list[int] = []  # the axes with one index
    for axis, (size, taken) in enumerate(zip(shape, sizes, strict=True)):
        # The whole axis, or another operation.
        if axis not in numbers.start_index_map:
            cuts.append((0, size, 1))
            if taken != size:
                return None
            continue
        cut = _progression(indices[..., list(numbers.start_index_map).index(axis)])
        if cut is None:
            return None
        start, step, count, varying = cut
        if varying is None:
            # One index along the axis, which the result may or may not keep.
            single += [] if axis in placed else [axis]
        elif taken != 1 or axis in placed:
            return None
        else:
            placed[axis] = batch_axes[varying]
        limit = start + (count - 1) * step + taken
        if start < 0 or not at_least(size, limit):  # or it is not known, of a symbol
            return None
        cuts.append((start, limit, step))
    # An axis of the result that nothing varies along has one element: it is a slice of one index.
    rest = [axis for axis in batch_axes if axis not in placed.values()]
    # Of several axes with one index those are kept that give the result's order.
    for chosen in itertools.combinations(single, len(rest)):
        whole = placed | dict(zip(chosen, rest, strict=True))
        if [whole[axis] for axis in sorted(whole)] == list(range(rank)):
            dropped = tuple(axis for axis in range(len(shape)) if axis not in whole)
            starts, limits, strides = zip(*cuts, strict=True)
            return _Slice(starts, limits, strides, dropped)
    return None


def _progression(values: np.ndarray) -> tuple[int, int, int, int | None] | None:
    """Start, step and number of indices, and the axis along which they vary, if any."""
    if values.size == 0:
        return None
    first = int(values.flat[0])
    # Indices that run along one axis in equal steps are a slice.
    varying = [a for a in range(values.ndim) if (values != values.take([0], a)).any()]
    if not varying:
        return first, 1, 1, None
    if len(varying) != 1:
        return None
    (axis,) = varying
    line = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0]
    steps = np.diff(line)
    if steps[0] <= 0 or (steps != steps[0]).any():
        return None
    return first, int(steps[0]), len(line), axis


def _known_indices(graph: ir.Graph, atom: ir.Atom) -> np.ndarray | None:
    """The value of indices that depend on no parameter and on no symbolic size."""
    if isinstance(atom, ir.Literal):
        return np.asarray(atom.value)
    if not graph.static[atom] or graph.sources(atom):
        return None
    equations = list(ir.upstream(graph, [atom]))
    shapes = [graph.shape(v) for eqn in equations for v in (*eqn.input_vars, *eqn.outputs)]
    symbolic = any(not isinstance(size, int) for shape in shapes for size in shape)
    if symbolic or any(eqn.name == "dim_as_value" for eqn in equations):
        return None
    with jax.ensure_compile_time_eval():  # this may run inside a trace of the whole model
        table = evaluate.float_table(equations)
        env = evaluate.evaluate(graph, {}, [None] * len(graph.inputs), table)
        return np.asarray(env.read(atom))
