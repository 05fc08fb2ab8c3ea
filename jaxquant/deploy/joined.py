"""Which equations of a graph an exporter writes as one operator, next to its int8 sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from jaxquant.graph import ir
from jaxquant.graph.operators import Operator, find_operators
from jaxquant.plan.binding import Binding


class Joined:
    """The operators of one graph.

    Attributes:
      by_last: the operators by the index of their last equation.
      inside: the indices of their other equations.

    Args:
      graph: of the model or of a body.
      kinds: the operators that the exporter has.
      binding: what is int8 in the graph; None of one in float.
      equations: what runs in float.
    """

    def __init__(
        self,
        graph: ir.Graph,
        kinds: Collection[str],
        equations: Sequence[ir.Equation],
        binding: Binding | None,
    ) -> None:
        self._graph = graph
        self._binding = binding
        running = {eqn.index for eqn in equations}
        # The last equation is where the operator runs: all that it reads is there then.
        self.by_last: Mapping[int, Operator] = {
            last: operator
            for last, operator in find_operators(graph, kinds).items()
            if running.issuperset(operator.members) and self._is_float(operator)
        }
        self.inside = frozenset(
            index for each in self.by_last.values() for index in each.members[:-1]
        )

    def reads_int8(self, operator: Operator) -> bool:
        """Whether operands with an int8 form are read dequantized."""
        forms = None if self._binding is None else self._binding.forms
        return forms is not None and any(i in forms.reads_int8 for i in operator.members)

    def _is_float(self, operator: Operator) -> bool:
        """Whether nothing between the operands and the result is int8, and all read them alike."""
        if self._binding is None:
            return True
        graph, forms, binding = self._graph, self._binding.forms, self._binding
        members = [graph.equations[index] for index in operator.members]
        inner = {v for eqn in members[:-1] for v in eqn.outputs}
        # A site writes its epilogue itself, so no operator may end inside one.
        ends = {each.epilogue.output for each in binding.sites}
        # What moves integers or decides by them has its own place in the network.
        special = forms.moves | binding.picks | binding.decisions
        if inner & (forms.int8 | ends) or special.intersection(operator.members):
            return False

        # An operator reads its operands in one form: all dequantized, or none.
        readers = [eqn for eqn in members if {*eqn.input_vars} & forms.int8]
        return len({eqn.index in forms.reads_int8 for eqn in readers}) <= 1
