"""The search for int8 forms: backwards from the sites that need int8, forwards from where it is."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.composites import PATTERNS
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.constants import takes_constants
from jaxquant.plan.epilogue import fused_end
from jaxquant.plan.float_readers import may_read_int8
from jaxquant.plan.forms import Forms


def find_forms(
    model: Model,
    sites: Sequence[Site],
    listed: Collection[str] = (),
    barred: Collection[int] = (),
    rounds: bool = False,
) -> Forms:
    """The forms when `sites`, and no others, run in int8 wherever that is of use.

    Args:
      model: the traced model.
      sites: those that may run in int8.
      listed: the kinds that were asked for; of them, elementwise kinds and activation functions
        let elementwise equations read int8, "relu" lets a ReLU of an int8 tensor stay int8.
      barred: the indices of equations that stay float, so that they hand no int8 through.
      rounds: what sites with a weight and sums give is rounded to an int8 grid, whoever reads it.
    """
    elementwise = not {*kinds.ELEMENTWISE_KINDS, *kinds.ACTIVATION_KINDS}.isdisjoint(listed)
    # As hashable values: the search is the same for each plan that asks for the same.
    return _found(model, tuple(sites), elementwise, "relu" in listed, frozenset(barred), rounds)


@once
def _found(
    model: Model,
    sites: tuple[Site, ...],
    elementwise: bool,
    relu: bool,
    barred: frozenset[int],
    rounds: bool,
) -> Forms:
    return _Search(model, sites, elementwise, relu, barred, rounds).found()


class _Search:
    def __init__(
        self,
        model: Model,
        sites: Sequence[Site],
        elementwise: bool,
        relu: bool,
        barred: frozenset[int],
        rounds: bool,
    ):
        self._graph = graph = model.graph
        self._composites = model.composites
        self._sites = sites
        self._by_equation = {site.equation: site for site in sites}
        self._behaviour = {
            site.equation: behaviours.behaviour_of(site.kind, graph.equations[site.equation])
            for site in sites
        }
        self._elementwise = elementwise
        self._relu = relu
        self._barred = barred
        self._rounds = rounds
        self._normalising = model.composites.normalisations
        self._entries: dict[ir.Var, None] = {}
        self._int8: set[ir.Var] = set()
        self._moves: set[int] = set()

    def found(self) -> Forms:
        # Backwards first, from those that cannot do without int8; what they leave in float may join
        # afterwards, and only then is it known what can be handed forward.
        for site in self._sites:
            if self._is_anchor(site):
                self._need_operands(site)
        ends = self._round_results() if self._rounds else set[ir.Var]()
        self._cut_elementwise()
        self._spread()
        return Forms(
            tuple(self._entries),
            frozenset(self._int8),
            frozenset(self._moves),
            frozenset(self._reads_int8()),
            _families(self._int8, self._ties()),
            frozenset(ends & self._entries.keys()),
        )

    def _is_anchor(self, site: Site) -> bool:
        """True where a site makes its operands int8, whoever reads what it gives."""
        eqn, behaviour = self._graph.equations[site.equation], self._behaviour[site.equation]
        # A concatenation is of use in int8 only for those who would quantize its result.
        if kinds.is_join(eqn):
            return takes_constants(self._graph, eqn) and self._leads_to_int8(eqn)
        anchors = (behaviours.ACCUMULATE, behaviours.PICK, behaviours.DECIDE)
        return behaviour in anchors or site.kind in PATTERNS

    def _leads_to_int8(self, eqn: ir.Equation) -> bool:
        """True where an int8 site reads what an equation gives: moved, or as a function of it.

        A concatenation that ends in an output, or in operations that have no int8 form, would be
        rounded to one scale for nothing.
        """
        graph = self._graph
        # Through what moves values or computes on them one by one; a stack, since models are deep.
        stack, seen = list(eqn.outputs), set(eqn.outputs)
        while stack:
            var = stack.pop()
            if var in self._read_by_sites:
                return True
            for user in graph.consumers.get(var, ()):
                # Conversions between floats keep the integers.
                moves = self._hands_through(user) or user.name == "convert_element_type"
                function = self._elementwise and self._bases.get(user.outputs[0]) is not None
                if user.index not in self._barred and (moves or function):
                    stack += [v for v in user.outputs if v not in seen]
                    seen.update(user.outputs)
        return False

    @functools.cached_property
    def _read_by_sites(self) -> frozenset[ir.Var]:
        """The tensors that sites compute on in int8, or decide by."""
        moving = (behaviours.PICK, behaviours.LAYOUT)
        found: set[ir.Var] = set()
        for site in self._sites:
            # What moves values needs them in int8 only if somebody behind it does.
            if self._behaviour[site.equation] not in moving:
                is_elementwise = site.kind in kinds.ELEMENTWISE_KINDS
                found.update(self._to_quantize(site) if is_elementwise else site.operands)
        return frozenset(found)

    @property
    def _bases(self) -> Mapping[ir.Var, ir.Var]:
        return self._composites.bases

    def _need_operands(self, site: Site) -> None:
        for operand in site.operands:
            self._need(operand)
        if self._behaviour[site.equation] == behaviours.PICK:
            # It picks int8 from int8, so its result is there too.
            eqn = self._graph.equations[site.equation]
            self._moves.add(eqn.index)
            self._int8.update(eqn.outputs)

    def _need(self, var: ir.Var) -> None:
        """Give a tensor an int8 form: through the operation that moves it, or as an entry."""
        # Backwards as long as operations only move values: quantizing before them is the same,
        # once.
        stack = [var]
        while stack:
            var = stack.pop()
            if var in self._int8:
                continue
            self._int8.add(var)
            eqn = self._graph.producer.get(var)
            if eqn is None or not self._hands_through(eqn):
                self._entries[var] = None
                continue
            self._moves.add(eqn.index)
            self._int8.update(eqn.outputs)
            stack.extend(self._moved(eqn))

    def _hands_through(self, eqn: ir.Equation) -> bool:
        # An equation whose constants fit no grid would make of them something else.
        if eqn.index in self._barred or not takes_constants(self._graph, eqn):
            return False
        if self._relu and primitives.is_relu(eqn) and self._is_selected(eqn.input_vars[0]):
            return True  # max(q, 0) on the scale that the tensor has
        if self._behaviour.get(eqn.index) in (behaviours.PICK, behaviours.LAYOUT):
            return True
        if eqn.name == "convert_element_type" and eqn.inputs[0] in self._int8:
            return True  # between float types: the integers are the same
        return primitives.is_movement(self._graph, eqn)

    def _is_selected(self, var: ir.Var) -> bool:
        """True where a tensor is int8 by selection: it was never float, so there is no epilogue."""
        eqn = self._graph.producer.get(var)
        return eqn is not None and self._behaviour.get(eqn.index) == behaviours.PICK

    def _moved(self, eqn: ir.Equation) -> tuple[ir.Var, ...]:
        """The operands whose values an equation hands through."""
        if eqn.index in self._by_equation:
            return self._by_equation[eqn.index].operands
        return eqn.input_vars

    def _cut_elementwise(self) -> None:
        """Give the operands of elementwise sites an int8 form unless they stay in an epilogue.

        What is computed for one such site alone is fused with it: the accumulator of the
        convolution before an addition, say.  Of two accumulators the later one is.
        """
        bases = self._bases
        for site in self._sites:
            if site.kind not in kinds.ELEMENTWISE_KINDS:
                continue
            fused: list[ir.Var] = []
            for operand in self._to_quantize(site):
                if not self._rounds and self._is_fused(operand, site, bases):
                    fused.append(operand)
                else:
                    self._need(operand)
            # One accumulator alone can be in registers; the others are read from memory, as int8.
            # In order of evaluation: the last one computed is the one still in registers.
            positions = {v: self._position(bases.get(v, v)) for v in fused}
            for operand in sorted(fused, key=positions.__getitem__)[:-1]:
                self._need(operand)

    def _round_results(self) -> set[ir.Var]:
        """Give what sites give an int8 form, behind the clips that are fused with them.

        A product of two activations is left in float where somebody reads it so.
        """
        ends = set[ir.Var]()
        for site in self._sites:
            is_product = site.contraction is not None and site.weight is None
            if self._behaviour[site.equation] == behaviours.ACCUMULATE and not is_product:
                ends.add(fused_end(self._graph, site))
        for var in sorted(ends):
            self._need(var)
        return ends

    def _to_quantize(self, site: Site) -> tuple[ir.Var, ...]:
        """The operands of an elementwise site, without a divisor: it could be rounded to zero."""
        eqn = self._graph.equations[site.equation]
        return tuple(v for v in site.operands if eqn.name != "div" or v != eqn.inputs[1])

    def _position(self, var: ir.Var) -> int:
        eqn = self._graph.producer.get(var)
        return eqn.index if eqn is not None else -1

    def _is_fused(self, operand: ir.Var, site: Site, bases: Mapping[ir.Var, ir.Var]) -> bool:
        """True where the operand is computed, elementwise, for this site alone."""
        graph, eqn = self._graph, self._graph.equations[site.equation]
        if operand in self._int8 or graph.shape(operand) != graph.shape(eqn.outputs[0]):
            return False
        base = bases.get(operand, operand)
        # What is read as it comes has no computation that could be fused.
        source = graph.producer.get(base)
        if source is None or not self._is_computed(source):
            return False
        # All that is computed of the base on the way here has to stay within this site.
        region = {v for v, b in bases.items() if b == base} | {base}
        if any(graph.producer[v].index in self._normalising for v in region if v != base):
            return False
        for var in region:
            if var in graph.output_vars or var in self._int8:
                return False
            for user in graph.consumers.get(var, ()):
                if user.index != site.equation and not set(user.outputs) <= region:
                    return False
        return True

    def _is_computed(self, eqn: ir.Equation) -> bool:
        """True where a result is in float32 registers: an accumulator or an elementwise site."""
        behaviour = self._behaviour.get(eqn.index)
        return behaviour == behaviours.ACCUMULATE or (
            behaviour == behaviours.COMPUTE and self._by_equation[eqn.index].kind not in PATTERNS
        )

    def _spread(self) -> None:
        """Hand int8 forward through layout operations to whoever reads int8."""
        graph, spread = self._graph, []
        for eqn in graph.equations:
            if self._behaviour.get(eqn.index) != behaviours.LAYOUT or eqn.index in self._moves:
                continue
            # Operands that are no values (indices) need no int8 form.
            operands = self._moved(eqn)
            if not takes_constants(self._graph, eqn):
                continue
            if operands and all(v in self._int8 for v in operands):
                spread.append(eqn)
                self._int8.update(eqn.outputs)
        # What no reader of int8 is behind would only be dequantized again: from the end, so that a
        # chain of movements counts as read where its last one is.
        readers = self._moves | self._reads_int8()
        for eqn in reversed(spread):
            users = (u.index for v in eqn.outputs for u in graph.consumers.get(v, ()))
            if any(user in readers for user in users):
                self._moves.add(eqn.index)
                readers.add(eqn.index)
            else:
                self._int8.difference_update(eqn.outputs)

    def _reads_int8(self) -> set[int]:
        """Float equations that read int8: composites, elementwise ones if their kinds are asked."""
        found: set[int] = set()
        for site in self._sites:
            if site.kind in PATTERNS:
                found.update(self._composites.whole[site.equation].members)
            elif self._behaviour[site.equation] == behaviours.DECIDE:
                found.add(site.equation)
        # With elementwise kinds listed all elementwise equations read int8, but for those that the
        # user left out by a rule or a skip.
        if self._elementwise:
            named = {s.equation for s in self._sites}
            skipped = set(self._elementwise_float(named))
            found.update(
                eqn.index
                for eqn in self._graph.equations
                if primitives.is_elementwise(eqn) and eqn.index not in skipped
            )
            found |= self._normalising
        graph = self._graph
        return {
            i for i in found if may_read_int8(graph, graph.equations[i], self._int8, self._barred)
        }

    def _ties(self) -> Iterator[list[ir.Var]]:
        """The int8 tensors that each moving equation gives one scale."""
        for index in sorted(self._moves):
            eqn = self._graph.equations[index]
            yield [v for v in (*self._moved(eqn), *eqn.outputs) if v in self._int8]

    def _elementwise_float(self, named: set[int]) -> list[int]:
        """Elementwise operations of two tensors that were left out of the int8 sites."""
        return [
            eqn.index
            for eqn in self._graph.equations
            # Not those with a base: they are functions of one tensor, as activations are.
            if kinds.kind_of(self._graph, eqn) in kinds.ELEMENTWISE_KINDS
            and eqn.outputs[0] not in self._bases
            and eqn.index not in named
        ]


def _families(
    tensors: Collection[ir.Var], ties: Iterable[Sequence[ir.Var]]
) -> dict[ir.Var, ir.Var]:
    """Each tensor -> the first of all that are tied to it, in one step or in several."""
    parent = {var: var for var in tensors}

    # Union and find, the smaller number standing for all: numbers go in evaluation order.
    def find(var: ir.Var) -> ir.Var:
        while parent[var] != var:
            # Paths are halved on the way, so that long chains stay cheap.
            parent[var] = parent[parent[var]]
            var = parent[var]
        return var

    for tied in ties:
        for var in tied[1:]:
            a, b = sorted((find(tied[0]), find(var)))
            parent[b] = a
    return {var: find(var) for var in parent}
