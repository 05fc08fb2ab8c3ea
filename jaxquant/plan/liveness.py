"""What still runs, and which parameters are still read in float, once sites are int8."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.plan.binding import Binding


class Live(NamedTuple):
    """What a program evaluates.

    Attributes:
      equations: those whose float results are needed, in order.
      sources: the parameters and constants that they read.
      restored: the static tensors that they read from the integers of a stored weight.
    """

    equations: list[ir.Equation]
    sources: list[ir.Var]
    restored: list[ir.Var]


@once
def live_equations(binding: Binding) -> Live:
    """The equations whose float results are needed, and what they read.

    Demand runs backwards from the model's outputs.  It is for a tensor's float or for its int8
    form; an accumulating site stands for everything up to the end of its epilogue.
    """
    return _Demand(binding).found()


def float_leaves(binding: Binding) -> list[ir.Var]:
    """The parameter leaves that are still read in float."""
    sources = set(live_equations(binding).sources)
    return [var for var in binding.graph.leaves if var in sources]


class _Demand:
    def __init__(self, binding: Binding):
        self._graph = graph = binding.graph
        self._binding = binding
        self._by_output = {s.epilogue.output: s for s in binding.sites}
        # Outputs are read in float, always.
        self._stack = [(var, False) for var in graph.output_vars]

    def found(self) -> Live:
        live: set[int] = set()
        restored: set[ir.Var] = set()
        sources: set[ir.Var] = set()
        seen: set[tuple[ir.Var, bool]] = set()
        # From the outputs back; a tensor is asked for in int8 or in float, and may be in both.
        while self._stack:
            demand = self._stack.pop()
            if demand in seen:
                continue
            seen.add(demand)
            var, int8 = demand
            eqn = self._graph.producer.get(var)
            if int8:
                self._int8(var, eqn)
            elif var in self._binding.restorable:
                restored.add(var)
            elif eqn is None:
                sources.add(var)
            else:
                live.add(eqn.index)
                self._float(var, eqn)
        # In the order of the graph, which is one in which they can run.
        equations = [eqn for eqn in self._graph.equations if eqn.index in live]
        return Live(equations, sorted(sources), sorted(restored))

    def _int8(self, var: ir.Var, eqn: ir.Equation | None) -> None:
        forms = self._binding.forms
        if var in self._binding.names or eqn is None:
            # Quantized here, so its float is needed first.
            self._stack.append((var, False))
        else:
            # Moved or selected from int8: what is moved is needed in int8, indices as they are.
            self._stack += [(v, v in forms.int8) for v in eqn.input_vars]

    def _float(self, var: ir.Var, eqn: ir.Equation) -> None:
        forms = self._binding.forms
        # What a site's epilogue absorbed is not asked for: the site reads its own operands alone.
        if var in self._by_output:
            int8_site = self._by_output[var]
            site = int8_site.site
            own = self._graph.equations[site.equation]
            read = [v for v in own.input_vars if v != site.weight]  # an embedding's indices too
            self._stack += [(v, v in forms.int8 and not int8_site.dynamic) for v in read]
            if site.computes_weight and site.weight is not None:
                # Its float is rounded in the call.
                self._stack.append((site.weight, False))
        elif eqn.index in self._binding.picks:
            # It picks integers, so the float is that of its int8 form.
            self._stack.append((var, True))
        elif eqn.index in forms.reads_int8:
            self._stack += [(v, v in forms.int8) for v in eqn.input_vars]
        else:
            needed = operands_of_loop(self._binding, eqn)
            self._stack += [(v, False) for v in eqn.input_vars if v in needed]


def operands_of_loop(binding: Binding, eqn: ir.Equation) -> frozenset[ir.Var]:
    """The tensors that an equation reads: of a loop without the weights that are int8 inside."""
    bodies = binding.bodies.get(eqn.index, ())
    if not any(body.layers[0].holds_int8 for body in bodies):
        return frozenset(eqn.input_vars)
    leaves = [(body.model.leaf_operands, float_leaves(body.layers[0])) for body in bodies]
    # A weight that a body stores is no operand any more, unless somebody else reads it there.
    unread = {var for operands, _ in leaves for var in operands.values()}
    unread -= {operands[leaf] for operands, read in leaves for leaf in read}
    given = [x for body in bodies for x in _inputs_of(body.model)]
    others = {x for x in (*given, *_of_test(eqn)) if isinstance(x, int)}
    return frozenset(v for v in eqn.input_vars if v not in unread or v in others)


def _inputs_of(body: Model) -> list[ir.Atom]:
    """The operands that a body does not read as parameters."""
    assert body.body is not None
    # What a body reads otherwise than as a parameter, it reads as a value.
    pairs = zip(body.body.arguments, body.body.operands, strict=True)
    return [x for var, x in pairs if var not in body.leaf_operands and x is not None]


def _of_test(eqn: ir.Equation) -> tuple[ir.Atom, ...]:
    """What the test of a loop or the choice of a branch reads."""
    if eqn.name == "while":
        return eqn.inputs[: eqn.params["cond_nconsts"]]
    return eqn.inputs[:1] if eqn.name == "cond" else ()


def read_in_float(binding: Binding, live: Iterable[ir.Equation]) -> frozenset[ir.Var]:
    """The tensors whose float value something other than their quantization reads."""
    graph, forms = binding.graph, binding.forms
    ends = {s.epilogue.output: s for s in binding.sites}
    found = set(graph.output_vars)
    for eqn in live:
        # An int8 site reads integers, but for operands that it scales in the call.
        if eqn.outputs[0] in ends:
            int8_site = ends[eqn.outputs[0]]
            site = int8_site.site
            if int8_site.dynamic:
                found.update(site.operands)
            if site.computes_weight and site.weight is not None:
                found.add(site.weight)
        # Its integers are dequantized; the operands' floats are not read.
        elif eqn.index in binding.picks:
            continue
        elif eqn.index in forms.reads_int8:
            found.update(v for v in eqn.input_vars if v not in forms.int8)
        else:
            found.update(operands_of_loop(binding, eqn))
    # A constant that is moved beside int8 is quantized from its float.
    for index in forms.moves:
        found.update(v for v in graph.equations[index].input_vars if v not in forms.int8)
    return frozenset(found)
