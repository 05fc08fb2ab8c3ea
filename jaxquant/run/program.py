"""The int8 program of one graph: a table of what runs in place of its equations."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.backends import platforms
from jaxquant.backends.choice import fastest_here
from jaxquant.graph import evaluate, ir
from jaxquant.plan import layout
from jaxquant.plan.binding import Binding, Int8Site
from jaxquant.plan.liveness import float_leaves, live_equations, read_in_float
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan
from jaxquant.run import accumulate, attentions, float_operations, loops, lowerings, shown
from jaxquant.run.calls import SiteCall, goes_on
from jaxquant.run.fusion import find_chains
from jaxquant.run.hidden import find_hidden
from jaxquant.run.lookups import looked_up
from jaxquant.run.loops import Inside
from jaxquant.run.lowerings import Evaluation, Hook, Lowering
from jaxquant.run.pooling import find_early_pools
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.run.sequences import Members, Sequenced, find_sequences, in_order
from jaxquant.run.siblings import find_dots, find_siblings
from jaxquant.run.thinning import thinned
from jaxquant.run.weights import StoredWeights


class Program:
    """Evaluates a graph with its int8 sites replaced.

    Args:
      binding: the model, and which of its sites are int8.
      params: the parameters or their shapes.
      table: the backends that run its calls.
      by_site: a call stands for a site alone, whose result can be seen and changed; else for what
        follows it too, where a kernel has that.
      body: of a body of a loop or choice, where it is; its `params` are None.

    Attributes:
      whole_plan: the plan with its parts in loops and choices; `plan` is that of its own graph.
      bodies: the programs of the bodies that hold int8 sites, by the index of their equation.
      equations: those whose float results are needed.
      lowerings: what runs, by the index of the equation that it stands for, in order.  A lowering
        of several equations has the index of the last one, and the others have no entry.
      calls: the sites with a stored weight, by name, where their scales are planned.
      sequences: the calls that run as one.
    """

    def __init__(
        self,
        binding: Binding,
        params: Any,
        table: platforms.Table = platforms.XLA_ALONE,
        by_site: bool = False,
        body: Inside | None = None,
    ):
        self.binding = binding
        self.model = binding.model
        self.graph = graph = binding.graph
        self.plan = plan = binding.plan
        self.mode = MODES[plan.mode]

        # What is computed at all, and what it reads: of stored weights, and of parameters in float.
        self.slots = binding.weight_slots(params) if body is None else body.slots
        self.weights = StoredWeights(graph, plan, self.slots)
        live = live_equations(self.binding)
        self.equations = live.equations
        self.restored = {var: self.binding.restorable[var] for var in live.restored}
        leaves = float_leaves(self.binding)
        self.float_paths: Mapping[ir.Var, tuple[str, ...]] = {}
        if body is None:
            paths = layout.leaf_paths(graph, params)
            self.float_paths = layout.float_paths(leaves, paths, self.slots)

        # Dots with scales of the call, or with dequantized weights: those of one tensor are one
        # product.
        self._dots = find_dots(
            graph, self._ends().values(), self.weights, is_integer=self.mode.integer
        )
        self._siblings = find_siblings(graph, self._dots.values())

        # Pools before calls: a call rounds on the grid of a pool behind it.
        self.early = find_early_pools(graph, self.binding, self.equations)
        self._backends = table
        self._by_site = by_site

        # A loop without an int8 site inside runs as JAX has it.
        self.body = body or Inside((binding,), self.slots)
        self.bodies = {
            eqn.index: self._programs(eqn)
            for eqn in self.equations
            if any(each.layers[0].holds_int8 for each in binding.bodies.get(eqn.index, ()))
        }

        # Calls are found before the table is: a lowering depends on what runs as one with it.
        calls = self._find_calls() if self.mode.tensor_scales else {}
        # By site every result is looked at whole, so no position is left out then.
        calls = calls if by_site else thinned(graph, calls)
        self.calls = {each.chain.site.site.name: each for each in calls.values()}
        self.sequences = [Sequenced(graph, m, calls) for m in self._find_sequences(calls)]
        absorbed = {index for each in calls.values() for index in each.chain.members}
        self._hidden = find_hidden(binding, self.equations, self.early, absorbed)
        self.lowerings = self._table(calls)

    def run(
        self,
        qparams: Mapping[str, Any],
        inputs: Sequence[Any],
        leaves: Mapping[ir.Var, Any] | None = None,
    ) -> evaluate.Environment:
        """Evaluate the program.

        Args:
          qparams: its arrays.
          inputs: the flattened model inputs; of a body the values of its inputs.
          leaves: of a body, the values of its leaves, as far as they are read in float.
        """
        return self._run(qparams, inputs, self._leaves(qparams) if leaves is None else leaves).env

    def outputs(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        """The model's outputs, in their own pytree; NaN where floats were that int8 cannot hold."""
        found = self.results(qparams, self._leaves(qparams), inputs)
        return jax.tree.unflatten(self.graph.out_tree, found)

    def results(
        self, qparams: Mapping[str, Any], leaves: Mapping[ir.Var, Any], inputs: Sequence[Any]
    ) -> list[Any]:
        """The flat outputs, or what a body gives in one step.

        NaN where floats were that int8 cannot hold.

        Args:
          qparams: the arrays of its sites, of one layer.
          leaves: the values of its leaves, as far as they are read in float.
          inputs: those of its inputs.
        """
        state = self._run(qparams, inputs, leaves)
        # As arrays: an output may be an input, or a number that is written in the model.
        values = [jnp.asarray(state.env.read(x)) for x in self.graph.outputs]
        return shown.on_outputs(self._hidden, state, values)

    def _leaves(self, qparams: Mapping[str, Any]) -> dict[ir.Var, Any]:
        return {var: layout.get(qparams["params"], path) for var, path in self.float_paths.items()}

    def _run(
        self, qparams: Mapping[str, Any], inputs: Sequence[Any], leaves: Mapping[ir.Var, Any]
    ) -> Evaluation:
        # Weights that float equations read too come back from their integers: both read the same.
        restored = {var: self.weights.restore(r, qparams) for var, r in self.restored.items()}
        leaves = {**leaves, **restored}
        env = evaluate.Environment(self.graph, leaves, inputs)
        quantized = QuantizedTensors(
            env,
            self.binding,
            qparams["tensors"],
            self.early,
            self._hidden,
            self.body.varies,
            natively=bool(platforms.kernels(self._backends)),
        )
        state = Evaluation(qparams, env, quantized, sums={})
        evaluate.run(env, {**self.lowerings, **self._rounding()}, state)
        return state

    def _rounding(self) -> dict[int, Lowering]:
        """The lowerings of what is rounded for everybody; hooks see it before that."""
        found = {}
        # Only what some equation reads in float has to be rounded for it.
        for var in self.binding.forms.rounded & read_in_float(self.binding, self.equations):
            index = self.graph.producer[var].index if var in self.graph.producer else -1
            if index in self.lowerings:
                found[index] = lowerings.rounded(self.lowerings[index], var)
        return found

    def hooked(self, hook: Hook) -> Program:
        """The program with `hook(site, lowering)` in place of the lowering of each int8 site.

        Those are the sites with an accumulator or a weight.  A site's lowering gives the value at
        the end of its epilogue; so a program whose calls go on behind it has no hooks.
        """
        # A call over several equations would hide the value between them from a hook.
        assert self._by_site, "a call may go on behind its site, but for by_site=True"
        return self.replacing(
            {index: hook(site, self.lowerings[index]) for index, site in self._ends().items()}
        )

    def replacing(self, others: Mapping[int, Lowering]) -> Program:
        """The program with other lowerings in place of some of its own."""
        other = copy.copy(self)
        other.lowerings = {**self.lowerings, **others}
        return other

    def pack(self, qparams: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The weights as the kernels read them, by site; those in a scan for each layer."""
        packed: dict[str, jax.Array] = {}
        # Sites inside have names of their own in the whole model, so that one dict holds all.
        for bodies in self.bodies.values():
            for body in bodies:
                packed |= loops.pack(body, qparams)
        # Platforms may have several backends: packed is for the first that runs the call by a
        # kernel.
        for name, each in self.calls.items():
            backends = platforms.kernels(self._backends)
            kernel = next((k for k in backends if k.covers(each.call)), None)
            if kernel is not None:
                weight = layout.get(qparams["params"], each.slot.int8)
                packed[name] = kernel.pack(each.call, weight)
        # Dots that scale their rows in the call are no calls, but have a weight to pack too.
        for site in self._ends().values():
            if site.dynamic and site.site.stored_weight is not None and not site.site.is_lookup:
                weight = self.weights.integers(site.site, qparams)
                dot = self._dots.get(site.site.name)
                found = accumulate.packed(self.graph, site.site, dot, weight, self._backends)
                if found is not None:
                    packed[site.site.name] = found
        return packed

    def _programs(self, eqn: ir.Equation) -> tuple[Program, ...]:
        """The programs of the bodies of a loop or choice."""
        found = []
        for number, body in enumerate(self.binding.bodies[eqn.index]):
            # The layers of this body in every layer around it: one program has to serve them all.
            layers = [
                layer
                for each in self.body.layers
                for layer in each.bodies[eqn.index][number].layers
            ]
            inside = Inside(tuple(layers), self.slots, body.shared_weights(self.slots))
            binding = dataclasses.replace(layers[0], per_channel=inside.per_channel)
            found.append(Program(binding, None, self._backends, self._by_site, inside))
        return tuple(found)

    def _ends(self) -> dict[int, Int8Site]:
        """The live int8 sites by the index of the equation that ends their epilogue."""
        live = {eqn.index for eqn in self.equations}
        ends = {self.graph.producer[s.epilogue.output].index: s for s in self.binding.sites}
        return {index: site for index, site in ends.items() if index in live}

    @functools.cached_property
    def whole_plan(self) -> Plan:
        return self.binding.whole_plan

    def _find_calls(self) -> dict[int, SiteCall]:
        """The calls by the index of the last equation that they stand for."""
        graph, zero_points = self.graph, self.binding.zero_points
        pools = {eqn.index for eqn in self.early.values()}
        # A pooling that is taken out early has run before its chain does.
        running = [eqn for eqn in self.equations if eqn.index not in pools]

        def holds_more(site: Int8Site) -> bool:
            return not self._by_site and goes_on(self._backends, graph, site, zero_points)

        chains = find_chains(graph, self.binding, running, self.early, holds_more)
        return {
            last: SiteCall(
                graph, chain, zero_points, self.slots[chain.site.site.name], self.body.varies
            )
            for last, chain in chains.items()
        }

    def _find_sequences(self, calls: Mapping[int, SiteCall]) -> list[Members]:
        if self._by_site:
            return []
        table = self._backends
        # For XLA a sequence is the same operations: only kernels make something of it.
        fused = {last: each for last, each in calls.items() if platforms.covers(table, each.call)}
        return find_sequences(self.graph, fused, functools.partial(platforms.joins, table))

    def _table(self, calls: Mapping[int, SiteCall]) -> dict[int, Lowering]:
        """Every equation as it is; over that the sites, and over those the calls."""
        members = [sequence.members for sequence in self.sequences]
        ordered = in_order(self.equations, members, calls)
        # From the general to the particular: a later entry stands for a group of earlier ones.
        in_float = {eqn.index: lowerings.in_float(eqn) for eqn in ordered}
        table = dict(in_float)
        table |= {eqn.index: self._on_int8(eqn) for eqn in self.equations if self._reads_int8(eqn)}
        table |= {index: self._of_site(site) for index, site in self._ends().items()}
        for index, bodies in self.bodies.items():
            table[index] = loops.lowering(self.graph.equations[index], bodies)
        table |= {last: self._calling(call) for last, call in calls.items()}
        table |= {
            index: shown.on_operands(self._hidden, self.graph.equations[index], table[index])
            for index in self._hidden.shown.keys() & table.keys()
        }

        # What a call, a sequence or an operation stands for has no entry of its own.
        inside = {index for call in calls.values() for index in call.chain.members} - calls.keys()
        if not self._by_site:
            # Only equations that nothing changed may go into an operation of floats.
            changed = {index for index in table if table[index] != in_float[index]}
            producer = self.graph.producer
            rounded = {producer[v].index for v in self.binding.forms.rounded if v in producer}
            for attention in self._attentions(calls, members):
                *others, last = attention.members
                table[last] = attentions.lowering(self.binding, attention, dict(table))
                inside.update(others)
                changed.add(last)
            as_they_are = in_float.keys() - inside - changed - rounded
            found = float_operations.find(
                self.binding,
                self._backends,
                as_they_are,
                lambda var: var not in self._hidden.origins,
            )
            for last, (operator, lowering) in found.items():
                table[last] = lowering
                inside.update(operator.members[:-1])
        for sequence in self.sequences:
            first, *others = sequence.members.chains
            # In the first call's place all that the sequence reads is there: `in_order` saw to it.
            table[first] = self._calling_sequence(sequence)
            inside.update(others)
        # Of what leaves a call in integers alone there are no floats to pool.
        integers = {call.chain.output for call in calls.values() if not call.chain.float_out}
        inside.update(e.index for e in self.early.values() if e.inputs[0] in integers)
        return {index: lowering for index, lowering in table.items() if index not in inside}

    def _attentions(
        self, calls: Mapping[int, SiteCall], sequences: Sequence[Members]
    ) -> list[attentions.Attention]:
        sequenced = {last for each in sequences for last in each.chains}
        alone = {last: call for last, call in calls.items() if last not in sequenced}
        return attentions.find(self.binding, alone, self._hidden.shown, self.body.varies)

    def _reads_int8(self, eqn: ir.Equation) -> bool:
        binding = self.binding
        may_read = eqn.index in binding.forms.reads_int8
        # An int8 form is not enough: the plan says which equations may read one.
        reads = may_read and any(var in binding.forms.int8 for var in eqn.input_vars)
        return reads or eqn.index in binding.picks | binding.decisions

    def _on_int8(self, eqn: ir.Equation) -> Lowering:
        if eqn.index in self.binding.picks:
            return lowerings.selected(eqn)
        if eqn.index in self.binding.decisions:
            return lowerings.decided(eqn)
        return lowerings.on_dequantized(eqn)

    def _of_site(self, site: Int8Site) -> Lowering:
        if site.site.is_lookup:
            return looked_up(self.graph, site, self.weights)
        name, given = site.site.name, (self.graph, site, self.weights, self._backends)
        siblings = self._siblings.get(name, ())
        if self._by_site:  # each shows its own result
            siblings = tuple(dot for dot in siblings if dot.name == name)
        if not self.mode.integer:
            return accumulate.on_dequantized_weight(*given, siblings)
        if site.dynamic:
            return accumulate.scaled_in_the_call(*given, siblings)
        return accumulate.of_tensors(self.graph, site)

    def _calling(self, each: SiteCall) -> Lowering:
        def lowering(state: Evaluation) -> evaluate.Values:
            operands = each.operands(state)
            if state.quantized.in_floats:  # XLA does that alone
                call = dataclasses.replace(each.call, in_floats=True)
                return each.keep(state, platforms.XLA.call(call, operands))
            return each.keep(state, platforms.run(self._backends, each.call, operands))

        return lowering

    def _calling_sequence(self, sequence: Sequenced) -> Lowering:
        calls = [each.call for each in sequence.calls]

        def lowering(state: Evaluation) -> evaluate.Values:
            operands = sequence.operands(state)
            # What calls give one another never leaves the kernel.
            results = platforms.run_sequence(
                self._backends, calls, sequence.links, operands, sequence.results
            )
            return sequence.keep(state, results)

        return lowering


def program_by_site(binding: Binding, params: Any) -> Program:
    """A program whose sites each show their result, by the backends that are fastest here."""
    return Program(binding, params, fastest_here(), by_site=True)
