"""Where NaN would be that int8 hides, found before anything runs.

What is quantized from a float that could hold NaN has a mark of its rows, which is NaN itself where
they are (`jaxquant.run.nonfinite`).  Behind who reads the int8 form the values are finite, and the
mark is followed in their place.  Equations that leave rows where they are need no computation;
those that move rows in int8 move the mark (`jaxquant.run.moved_rows`); those that move them in
float, and loops, are *shown* the NaN in their operands, and do with them what the float model does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp

from jaxquant.graph import ir, primitives
from jaxquant.graph.model import Model
from jaxquant.graph.positions import find_samples
from jaxquant.graph.regions import CONTROL_FLOW
from jaxquant.graph.rows import Rows, axis_of, rows_along, rows_of, through
from jaxquant.plan.binding import Binding
from jaxquant.run.moved_rows import Move, find_move
from jaxquant.run.nonfinite import makes_them, may_hold_them


class Moved(NamedTuple):
    """A mark that an equation gives: that of an operand's rows, moved to a result."""

    equation: int
    operand: int
    rows: Rows
    number: int


# A mark is named after the tensor that was quantized.
Name: TypeAlias = ir.Var | Moved
# What is hidden in a tensor: by its rows the marks that tell which of them are NaN; by None those
# of which any tells that all of it is.
Terms: TypeAlias = Mapping[Rows | None, frozenset[Name]]


class Hidden(NamedTuple):
    """What int8 hides of a graph's NaN.

    Attributes:
      origins: tensor -> from where it may hold NaN or infinity though the parameters hold none:
        itself, the model's inputs, or tensors that are quantized; where those are marked, it is.
      rows: those that are marked of a tensor with origins; None of one that is marked as a whole.
      moves: the marks that are moved on the way, and the marks that they are made of.
      shown: index of an equation -> number of an operand -> the NaN that it has to be shown.
      outputs: what is hidden in the graph's outputs.
    """

    origins: Mapping[ir.Var, frozenset[ir.Var]]
    rows: Mapping[ir.Var, Rows | None]
    moves: Mapping[Moved, tuple[Move, frozenset[Name]]]
    shown: Mapping[int, Mapping[int, Terms]]
    outputs: tuple[Terms, ...]


def find_hidden(
    binding: Binding,
    live: Sequence[ir.Equation],
    early: Mapping[ir.Var, ir.Equation],
    absorbed: Collection[int],
) -> Hidden:
    """Follow the NaN of a graph from where they may come to its outputs.

    Tensors with an int8 form that is handed over, and what an int8 site gives, hold none; but for a
    site that scales its operands in the call, whose scales are not finite where those are not.

    Args:
      binding: the plan in the graph.
      live: the equations that run in float or make a site's result.
      early: the max pools that run on integers, by the tensor that they give.
      absorbed: the indices of the equations that a call stands for.
    """
    return _Search(binding, {eqn.index for eqn in live}.difference(absorbed), early).found()


class _Search:
    def __init__(
        self, binding: Binding, live: Collection[int], early: Mapping[ir.Var, ir.Equation]
    ) -> None:
        self._binding, self._graph, self._early = binding, binding.graph, early
        movements = {eqn.index for each in binding.sites for eqn in each.epilogue.movements}
        self._in_float = {*live} - movements
        forms, graph = binding.forms, binding.graph
        # An embedding gives NaN for an index out of range, as it does in float.
        sums = [each for each in binding.sites if not (each.dynamic or each.site.is_lookup)]
        static = {each.epilogue.output for each in sums}
        self._safe = static | (forms.int8 - binding.names.keys())
        self._on_int8 = forms.moves | forms.reads_int8 | binding.picks | binding.decisions
        self._on_int8 |= {each.site.equation for each in binding.sites if not each.dynamic}
        self._pools = {eqn.index for eqn in early.values()}

        self._axes = _RowAxes(binding.model)
        self._origins = {v: frozenset({v}) for v in graph.inputs if may_hold_them(graph, v)}
        self._hidden: dict[ir.Var, dict[Rows | None, frozenset[Name]]] = {}
        self._moves: dict[Moved, tuple[Move, frozenset[Name]]] = {}
        self._shown: dict[int, Mapping[int, Terms]] = {}

    def found(self) -> Hidden:
        graph = self._graph
        for eqn in graph.equations:
            if eqn.outputs and not all(graph.static[var] for var in eqn.outputs):
                self._follow(eqn)
                self._find_origins(eqn)
        rows = {var: self._axes.of(var) for var in self._origins}
        outputs = tuple(self._read(None, x) for x in graph.outputs)
        return Hidden(self._origins, rows, self._moves, self._shown, outputs)

    def _find_origins(self, eqn: ir.Equation) -> None:
        """What an equation gives may hold NaN where its operands may, or where it makes them.

        What is computed element by element of tensors of its own shape has them only where those
        have them, so a mark of its origins serves it too.  Whatever else is its own origin.
        """
        graph, found = self._graph, self._origins
        makes = makes_them(graph, eqn) or eqn.index in self._shown or _replaces_them(graph, eqn)
        unsafe = [var for var in eqn.input_vars if var in found]
        if not unsafe and not makes:
            return
        for var in eqn.outputs:
            if var in self._safe or graph.static[var] or not may_hold_them(graph, var):
                continue
            of_others = frozenset[ir.Var]()
            if not makes and primitives.is_elementwise(eqn):
                entries = self._binding.names  # what is quantized has been marked
                of_others = of_others.union(*({x} if x in entries else found[x] for x in unsafe))
            marked = {x: (graph.shape(x), self._axes.of(x)) for x in (*unsafe, *of_others, var)}
            serves = of_others and all(each == marked[var] for each in marked.values())
            found[var] = of_others if serves else frozenset({var})

    def _follow(self, eqn: ir.Equation) -> None:
        """What is hidden in the results of an equation."""
        graph = self._graph
        given = {k: terms for k, x in enumerate(eqn.inputs) if (terms := self._read(eqn, x))}
        results = [k for k, var in enumerate(eqn.outputs) if may_hold_them(graph, var)]
        in_float = self._runs_in_float(eqn)
        looks_for_them = in_float and (_tells_them(eqn) or _replaces_them(graph, eqn))
        if given and (eqn.name in CONTROL_FLOW or looks_for_them):
            self._shown[eqn.index] = given
            return
        if not given or not results:
            return
        found: list[_Result] = []
        for operand, terms in given.items():
            for rows, names in terms.items():
                found += self._results(eqn, operand, rows, names, results)
        if in_float and any(each.is_moved for each in found):
            self._shown[eqn.index] = given
            return
        for each in found:
            self._add(eqn, each)

    def _results(
        self,
        eqn: ir.Equation,
        operand: int,
        rows: Rows | None,
        names: frozenset[Name],
        results: Sequence[int],
    ) -> list[_Result]:
        """What some rows of one operand of an equation hide in its results."""
        if eqn.name == "optimization_barrier":
            return [_Result(operand, operand, rows, rows, names)]
        if rows is None:
            return [_Result(k, operand, None, None, names) for k in results]
        kept = through(self._graph, eqn, operand, rows)
        sums = _sums(self._graph, eqn)
        return [
            _Result(k, operand, rows, kept[k], names, is_moved=kept[k] is None and not sums)
            for k in results
        ]

    def _add(self, eqn: ir.Equation, found: _Result) -> None:
        rows, names = found.after, found.names
        if rows is None and found.before is not None:
            move = find_move(self._graph, eqn, found.operand, found.before, found.number)
            if move is not None:
                name = Moved(eqn.index, found.operand, found.before, found.number)
                # Several marks of the same rows move as one.
                already = self._moves[name][1] if name in self._moves else frozenset()
                self._moves[name] = move, names | already
                rows, names = move.rows, frozenset({name})
        terms = self._hidden.setdefault(eqn.outputs[found.number], {})
        terms[rows] = terms.get(rows, frozenset()) | names

    def _runs_in_float(self, eqn: ir.Equation) -> bool:
        """Whether an equation runs as it is, on the floats that it reads."""
        return eqn.index in self._in_float and eqn.index not in self._on_int8 | self._pools

    def _read(self, eqn: ir.Equation | None, atom: ir.Atom) -> Terms:
        """What is hidden in what an equation reads, or in an output of the graph.

        The float itself of a tensor holds its NaN.
        """
        if not isinstance(atom, int) or not may_hold_them(self._graph, atom):
            return {}
        hidden, forms = self._hidden.get(atom, {}), self._binding.forms
        is_pooled = eqn is not None and eqn.index in self._pools
        in_int8 = eqn is not None and eqn.index in self._on_int8 and atom in forms.int8
        is_marked = atom not in self._early and atom in self._origins
        if not is_marked or not (in_int8 or is_pooled or atom in forms.rounded):
            return hidden
        rows = self._axes.of(atom)
        return {**hidden, rows: hidden.get(rows, frozenset()) | {atom}}


class _Result(NamedTuple):
    """What the rows of an operand hide in a result.

    Attributes:
      number: of the result.
      operand: its number.
      before, after: the rows of the operand, and those of the result; None for all of it.
      names: the marks.
      is_moved: it is not known what becomes of the rows.
    """

    number: int
    operand: int
    before: Rows | None
    after: Rows | None
    names: frozenset[Name]
    is_moved: bool = False


class _RowAxes:
    """Along which axis the rows of tensors are marked: that of the samples where it is known."""

    def __init__(self, model: Model) -> None:
        self._model, self._graph = model, model.graph
        self._samples = find_samples(model.whole)
        self._found: dict[ir.Var, Rows | None] = {}

    def of(self, var: ir.Var) -> Rows | None:
        """The rows of a tensor; None where it is one row."""
        if var not in self._found:
            self._found[var] = self._find(var)
        return self._found[var]

    def _find(self, var: ir.Var) -> Rows | None:
        shape = self._graph.shape(var)
        known = rows_of(self._samples.known(self._model, var))
        if len(shape) < 2:
            return known if known is not None and not self._is_summed(var) else None
        return known or rows_along(shape, self._behind(var))

    def _behind(self, var: ir.Var) -> int:
        """The axis of what a tensor is made of, if it has as many axes; else the first."""
        eqn, axes = self._graph.producer.get(var), len(self._graph.shape(var))
        for x in eqn.input_vars if eqn is not None else ():
            if len(self._graph.shape(x)) == axes and not self._graph.static[x]:
                known = rows_of(self._samples.known(self._model, x))
                if known is not None:
                    return axis_of(known)
        return 0

    def _is_summed(self, var: ir.Var) -> bool:
        """Whether a vector is one sample: all that reads it are dots, which sum over it."""
        readers = self._graph.consumers.get(var, ())
        return all(eqn.index in self._graph.contractions for eqn in readers)


def _sums(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether an equation makes every row of the result of all rows that it does not keep."""
    contraction = graph.contractions.get(eqn.index)
    if contraction is not None:
        return contraction.window is None
    is_plain = eqn.name in primitives.ELEMENTWISE or eqn.name == "broadcast_in_dim"
    return is_plain or eqn.name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")


def _tells_them(eqn: ir.Equation) -> bool:
    """Whether an equation tells what is NaN or infinite."""
    return eqn.name == "is_finite" or (eqn.name == "ne" and eqn.inputs[0] == eqn.inputs[1])


def _replaces_them(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """Whether an equation chooses by what is NaN or infinite, as `jnp.nan_to_num` does."""
    if eqn.name != "select_n":
        return False
    stack, seen = [eqn.inputs[0]], set[ir.Atom]()
    while stack:
        atom = stack.pop()
        test = graph.producer.get(atom) if isinstance(atom, int) and atom not in seen else None
        if test is None:
            continue
        seen.add(atom)
        if _tells_them(test):
            return True
        stack += [x for x in test.inputs if graph.dtype(x) == jnp.bool_]
    return False
