"""Tables of which a model adds some rows: `table[:n]`, `lax.dynamic_slice`, an embedding of arange.

A table of positions is read so, and where a text is as long as the table all of it is added, which
has to be the same model: a matrix whose rows lie along an axis of an input is a table, and one
whose rows are channels of a dot, as the bias of heads, is none.

Written as a lookup of rows by their numbers it is an embedding like any other: a site, whose table
is stored as integers.  What is looked up counts as an activation then, though no input is in it
where the numbers are known: JAX would compute it once from the parameters, and so need the table in
float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.graph import ir, kinds
from jaxquant.graph.axis_parts import Known, Part, nothing
from jaxquant.graph.position_rules import through
from jaxquant.graph.rewriting import Rewriting
from jaxquant.jax_shim import jaxprs

# Of these a tensor's values go on as they are; an addition of two such tensors likewise.
_HANDED_ON = frozenset({"broadcast_in_dim", "convert_element_type", "expand_dims", "reshape",
                        "squeeze"})  # fmt: skip
_ADDITIONS = frozenset({"add", "add_any"})
# Rows of a table, below which it is not worth the error of its integers, which all texts share (the
# two types of tokens of BERT).
_FEWEST = 8


def with_looked_up_rows(graph: ir.Graph) -> ir.Graph:
    """The graph with a lookup for each slice of a table that is added to activations."""
    found = {eqn.index for eqn in graph.equations if _reads_table(graph, eqn)}
    whole = _whole_tables(graph)
    return _Rewriter(graph).written(found, whole) if found or whole else graph


def _reads_table(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether an equation gives whole rows of one parameter that are added to activations."""
    if eqn.name not in ("slice", "dynamic_slice", "gather") or not graph.is_static(eqn.inputs[0]):
        return False
    table = eqn.inputs[0]
    if not isinstance(table, int) or not _may_be_table(graph, table):
        return False
    # Rows of a sum of parameters are computed; of a parameter they are stored.
    if not {*graph.sources(table)} <= {*graph.leaves} or len(graph.sources(table)) != 1:
        return False
    is_rows = kinds.is_lookup(graph, eqn) if eqn.name == "gather" else False
    if is_rows and not graph.static[eqn.outputs[0]]:
        return False  # it is a lookup as it is
    return (is_rows or _takes_rows(graph, eqn)) and _is_added(graph, eqn.outputs[0])


def _may_be_table(graph: ir.Graph, var: ir.Var) -> bool:
    """Whether a static tensor is of floats, [V, K] or [1, V, K]."""
    *first, rows, _ = (0, 0, *graph.shape(var))
    is_matrix = len(first) == 2 or (len(first) == 3 and first[-1] == 1)
    # As many rows as there are samples, in an export, are no table's.
    are_many = isinstance(rows, int) and rows >= _FEWEST
    return is_matrix and are_many and bool(jnp.issubdtype(graph.dtype(var), jnp.floating))


def _whole_tables(graph: ir.Graph) -> frozenset[ir.Var]:
    """The parameters [V, K] or [1, V, K] all of whose rows are added along an axis of an input."""
    candidates = [
        var for var in graph.leaves if _may_be_table(graph, var) and _is_added(graph, var)
    ]
    # Where axes go is followed through the whole graph, which most models are spared.
    if not candidates:
        return frozenset()
    along = _along_inputs(graph)
    return frozenset(var for var in candidates if _lies_along(graph, var, var, along))


def _lies_along(
    graph: ir.Graph, var: ir.Var, table: ir.Var, along: Mapping[ir.Var, frozenset[int]]
) -> bool:
    """Whether the rows of a table, as which `var` goes on, meet axes of inputs in all additions."""
    # Rows that were moved to another axis are no rows of a table any more.
    if graph.shape(var)[-2:] != graph.shape(table)[-2:]:
        return False
    for eqn in graph.consumers[var]:
        # Positions are as many as the input's tokens wherever the table is added.
        others = [x for x in eqn.inputs if isinstance(x, int) and not graph.is_static(x)]
        if not others and not _lies_along(graph, eqn.outputs[0], table, along):
            return False

        # The rows' axis is the last but one in whatever they are added to.
        rank = len(graph.shape(eqn.outputs[0]))
        if any(rank - 2 not in along.get(x, frozenset()) for x in others):
            return False
    return True


def _along_inputs(graph: ir.Graph) -> dict[ir.Var, frozenset[int]]:
    """The axes of tensors that are axes of inputs.

    But for the first ones, which are samples, and the last ones of floats, which are features.
    """
    known: dict[ir.Var, Known] = {}
    for number, var in enumerate(graph.inputs):
        shape = graph.shape(var)
        # Of floats the last axis is of features: its size may vary no more than the weight's does.
        features = int(jnp.issubdtype(graph.dtype(var), jnp.floating))
        marked = range(min(len(shape) - 1, 1), len(shape) - features)
        axes = [
            (Part(size, len(shape) * number + k if k in marked else None),)
            for k, size in enumerate(shape)
        ]
        known[var] = Known(tuple(axes))

    # Static tensors are no part of it: their axes are none of an input's.
    for eqn in graph.equations:
        operands = [
            known[x]
            if isinstance(x, int) and x in known
            else nothing(graph.shape(x), is_static=graph.is_static(x))
            for x in eqn.inputs
        ]
        if not all(graph.is_static(x) for x in eqn.inputs):
            known.update(zip(eqn.outputs, through(graph, eqn, operands), strict=True))
    return {
        var: frozenset(k for k, axis in enumerate(each.axes) if any(p.is_position for p in axis))
        for var, each in known.items()
    }


def _takes_rows(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether a slice is one of neighbouring rows of [V, K], or of [1, V, K].

    With symbolic sizes JAX writes one as a gather from one place.
    """
    before, after = graph.shape(eqn.inputs[0]), graph.shape(eqn.outputs[0])
    if len(after) != len(before):
        return False
    if eqn.name == "gather":
        every, numbers = tuple(range(len(after))), eqn.params["dimension_numbers"]
        is_slice = len(graph.shape(eqn.inputs[1])) == 1 and tuple(numbers.offset_dims) == every
        # Other modes fill or clip, which a slice does not.
        if not (is_slice and eqn.params["mode"] == lax.GatherScatterMode.PROMISE_IN_BOUNDS):
            return False
    elif eqn.params.get("strides") not in (None, (1,) * len(before)):
        return False
    return bool(before[-1] == after[-1])


def _is_added(graph: ir.Graph, var: ir.Var) -> bool:
    """Whether all that becomes of a tensor is that it is added to activations."""
    consumers = graph.consumers.get(var, ())
    if var in graph.output_vars or not consumers:
        return False
    return all(_adds(graph, eqn, var) for eqn in consumers)


def _adds(graph: ir.Graph, eqn: ir.Equation, var: ir.Var) -> bool:
    if eqn.name in _ADDITIONS:
        others = [x for x in eqn.inputs if x != var]
        if any(not graph.is_static(x) for x in others):
            return True
        # Two parameters that are added first are one table, if the sum goes on so.
        return bool(others) and _is_added(graph, eqn.outputs[0])
    return eqn.name in _HANDED_ON and _is_added(graph, eqn.outputs[0])


class _Rewriter(Rewriting):
    """Writes a graph anew, some of its slices as lookups."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__(graph)
        self._rows: dict[ir.Var, ir.Var] = {}  # a table -> all its rows, looked up

    def written(self, found: set[int], whole: frozenset[ir.Var]) -> ir.Graph:
        """The graph with lookups for the equations of these indices, and of all rows of tables."""
        for eqn in self.graph.equations:
            # A table that is also read whole gets its rows by a lookup of all of them, so that it
            # is stored once, as integers.
            for var in whole.intersection(eqn.input_vars) - self._rows.keys():
                self._look_up_all(eqn, var)
            inputs = tuple(self._rows.get(x, x) if isinstance(x, int) else x for x in eqn.inputs)
            eqn = dataclasses.replace(eqn, inputs=inputs)
            if eqn.index in found and not kinds.is_lookup(self.graph, eqn):
                self._look_up(eqn, self.graph.shape(eqn.outputs[0]))
            else:
                self._add(eqn, is_rows=eqn.index in found)
        return self.done()

    def _look_up_all(self, reader: ir.Equation, table: ir.Var) -> None:
        """The equations of a lookup of all rows of a table, before what reads it first."""
        aval, shape = self.graph.avals[table], self.graph.shape(table)
        rows = self.new(aval)
        params = {"start_indices": (0,) * len(shape), "limit_indices": shape, "strides": None}
        # A slice of everything: the reader reads what a lookup of all rows gives.
        whole = dataclasses.replace(
            reader, primitive=lax.slice_p, inputs=(table,), outputs=(rows,), params=params
        )
        self._look_up(whole, shape)
        self._rows[table] = rows

    def _look_up(self, eqn: ir.Equation, shape: tuple[Any, ...]) -> None:
        """The equations of a lookup in place of a slice, of a result of this shape."""
        graph = self.graph
        structs = [jax.ShapeDtypeStruct(graph.shape(x), graph.dtype(x)) for x in eqn.inputs]
        jaxpr = jax.make_jaxpr(_lookup_for(eqn, shape))(*structs).jaxpr
        env: dict[Any, ir.Atom] = dict(zip(jaxpr.invars, eqn.inputs, strict=True))
        # What JAX traces the lookup to takes the equation's place; its last result keeps its
        # number.
        for inner in jaxpr.eqns:
            (var,) = inner.outvars
            output = eqn.outputs[0] if var is jaxpr.outvars[0] else self.new(var.aval)
            env[var] = output
            inputs = tuple(
                ir.Literal(np.asarray(x.val, jaxprs.dtype_of(x)))
                if isinstance(x, jaxprs.Literal)
                else env[x]
                for x in inner.invars
            )
            self._add(
                dataclasses.replace(
                    eqn,
                    primitive=inner.primitive,
                    inputs=inputs,
                    outputs=(output,),
                    params=inner.params,
                ),
                is_rows=inner.primitive.name == "gather",
            )

    def _add(self, eqn: ir.Equation, is_rows: bool) -> None:
        """Add an equation; what depends on rows that are looked up is an activation."""
        self.add(eqn)
        operands = all(isinstance(x, ir.Literal) or self.static[x] for x in eqn.inputs)
        for var in eqn.outputs:
            # JAX would compute it from the table in float, once; as an activation it is looked up.
            self.static[var] = operands and not is_rows


def _lookup_for(eqn: ir.Equation, shape: tuple[Any, ...]) -> Callable[..., jax.Array]:
    """What a slice of rows computes, as a lookup: a function of the equation's operands.

    Args:
      eqn: a slice, a dynamic slice or a gather of neighbouring rows of [V, K] or [1, V, K].
      shape: of its result.
    """
    *_, count, width = shape

    def first(length: Any, starts: Sequence[jax.Array]) -> jax.Array:
        """The number of the first row."""
        if eqn.name == "slice":
            return jnp.int32(eqn.params["start_indices"][-2])
        if eqn.name == "dynamic_slice":  # which moves what would reach beyond the table
            start = lax.convert_element_type(starts[-2], jnp.int32)
            return lax.clamp(jnp.int32(0), start, jnp.asarray(length - count, jnp.int32))
        axes = eqn.params["dimension_numbers"].start_index_map
        if len(shape) - 2 not in axes:
            return jnp.int32(0)
        return lax.convert_element_type(starts[0][axes.index(len(shape) - 2)], jnp.int32)

    def rows(table: jax.Array, *starts: jax.Array) -> jax.Array:
        length = table.shape[-2]
        # Numbers from the first row on, as many as the slice has.
        numbers = lax.iota(jnp.int32, count) + first(length, starts)
        found = lax.gather(
            table if table.ndim == 2 else lax.reshape(table, (length, width)),
            lax.broadcast_in_dim(numbers, (count, 1), (0,)),
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            slice_sizes=(1, width),
            mode=lax.GatherScatterMode.CLIP,
        )
        return found if len(shape) == 2 else lax.reshape(found, shape)

    return rows
