"""The int8 program of one graph: a table of what runs in place of its equations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxquant import native
from jaxquant.graph import evaluate, ir
from jaxquant.plan import layout
from jaxquant.plan.bind import Binding, Int8Site
from jaxquant.plan.liveness import float_leaves, live_equations
from jaxquant.plan.modes import MODES
from jaxquant.run import accumulate, lowerings, nonfinite
from jaxquant.run.fused import FusedCall
from jaxquant.run.fusion import Fuse, find_chains
from jaxquant.run.lowerings import Evaluation, Hook, Lowering
from jaxquant.run.pooling import find_early_pools
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.run.sequences import FusedSequence, find_sequences, in_order
from jaxquant.run.weights import StoredWeights


class Program:
    """Evaluates a graph with its int8 sites replaced.

    Args:
      binding: the model, and which of its sites are int8.
      params: the parameters or their shapes.
      fuse: what the native kernels take over.
      packs_all: False to leave to XLA what takes the kernels longer because they have to pack its
        weight first.

    Attributes:
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
        fuse: Fuse = Fuse.NOTHING,
        packs_all: bool = True,
    ):
        self.binding = binding
        self.model = binding.model
        self.graph = graph = binding.graph
        self.plan = plan = binding.plan
        self.mode = MODES[plan.mode]
        paths = layout.leaf_paths(graph, params)
        self.slots = layout.weight_slots(graph, [s.site for s in self.binding.sites], paths, plan)
        self.weights = StoredWeights(graph, plan, self.slots)
        live = live_equations(graph, self.binding)
        self.equations = live.equations
        self.restored = {var: self.binding.restorable[var] for var in live.restored}
        leaves = float_leaves(graph, self.binding)
        self.float_paths = layout.float_paths(leaves, paths, self.slots)
        self.early = find_early_pools(graph, self.binding, self.equations)
        self._origins = nonfinite.find_origins(graph, self.binding)
        self._fuse = fuse if self.mode.tensor_scales else Fuse.NOTHING
        self._packs_all = packs_all

        calls = self._find_calls() if self.mode.tensor_scales else {}
        self.calls = {call.chain.site.site.name: call for call in calls.values()}
        found = find_sequences(graph, calls) if self._fuse is Fuse.CHAINS else []
        self.sequences = [FusedSequence(graph, members, calls) for members in found]
        self.lowerings = self._table(calls)

    def run(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> evaluate.Environment:
        """Evaluate the program.

        Args:
          qparams: its arrays.
          inputs: the flattened model inputs.
        """
        return self._run(qparams, inputs).env

    def outputs(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        """The model's outputs, in their own pytree; NaN where floats were that int8 cannot hold."""
        state = self._run(qparams, inputs)
        return nonfinite.with_marks(evaluate.outputs(state.env), state.quantized.marks)

    def _run(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> Evaluation:
        leaves = {
            var: layout.get(qparams["params"], path) for var, path in self.float_paths.items()
        }
        leaves |= {var: self.weights.restore(r, qparams) for var, r in self.restored.items()}
        env = evaluate.Environment(self.graph, leaves, inputs)
        quantized = QuantizedTensors(
            env, self.binding, qparams["tensors"], self.early, self._origins
        )
        state = Evaluation(qparams, env, quantized)
        evaluate.run(env, self.lowerings, state)
        return state

    def hooked(self, hook: Hook) -> Program:
        """The program with `hook(site, lowering)` in place of the lowering of each int8 site.

        Those are the sites with an accumulator or a weight.  A site's lowering gives the value at
        the end of its epilogue; so a program whose calls go on behind it has no hooks.
        """
        assert self._fuse is not Fuse.CHAINS, "a chain goes on behind its site"
        other = copy.copy(self)
        hooks = {index: hook(site, self.lowerings[index]) for index, site in self._ends().items()}
        other.lowerings = self.lowerings | hooks
        return other

    def pack(self, qparams: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The weights of the native calls as the kernels read them, by site."""
        return {
            name: call.pack(layout.get(qparams["params"], call.slot.int8))
            for name, call in self.calls.items()
            if call.is_native
        }

    def _ends(self) -> dict[int, Int8Site]:
        """The live int8 sites by the index of the equation that ends their epilogue."""
        live = {eqn.index for eqn in self.equations}
        ends = {self.graph.producer[s.epilogue.output].index: s for s in self.binding.sites}
        return {index: site for index, site in ends.items() if index in live}

    def _find_calls(self) -> dict[int, FusedCall]:
        """The calls by the index of the last equation that they stand for."""
        pools = {eqn.index for eqn in self.early.values()}
        running = [eqn for eqn in self.equations if eqn.index not in pools]
        chains = find_chains(self.graph, self.binding, running, self.early, self._fuse)
        zero_points, slots = self.binding.zero_points, self.slots
        return {
            last: FusedCall(self.graph, chain, zero_points, slots[chain.site.site.name])
            for last, chain in chains.items()
        }

    def _table(self, calls: Mapping[int, FusedCall]) -> dict[int, Lowering]:
        """Every equation as it is; over that the sites, and over those the calls."""
        members = [sequence.members for sequence in self.sequences]
        ordered = in_order(self.equations, members, calls)
        table = {eqn.index: lowerings.in_float(eqn) for eqn in ordered}
        table |= {eqn.index: self._on_int8(eqn) for eqn in self.equations if self._reads_int8(eqn)}
        table |= {index: self._of_site(site) for index, site in self._ends().items()}
        table |= {last: self._calling(call) for last, call in calls.items()}

        # What a call or a sequence stands for has no entry of its own.
        inside = {index for call in calls.values() for index in call.chain.members} - calls.keys()
        for sequence in self.sequences:
            first, *others = sequence.members.chains
            table[first] = self._calling_sequence(sequence)
            inside.update(others)
        # Of what leaves a call in integers alone there are no floats to pool.
        integers = {call.chain.output for call in calls.values() if not call.chain.float_out}
        inside.update(e.index for e in self.early.values() if e.inputs[0] in integers)
        return {index: lowering for index, lowering in table.items() if index not in inside}

    def _reads_int8(self, eqn: ir.Equation) -> bool:
        binding = self.binding
        return eqn.index in binding.selects | binding.decisions | binding.forms.reads_int8

    def _on_int8(self, eqn: ir.Equation) -> Lowering:
        if eqn.index in self.binding.selects:
            return lowerings.selected(eqn)
        if eqn.index in self.binding.decisions:
            return lowerings.decided(eqn)
        return lowerings.on_dequantized(eqn)

    def _of_site(self, site: Int8Site) -> Lowering:
        if not self.mode.integer:
            return accumulate.on_dequantized_weight(self.graph, site, self.weights)
        if not self.mode.tensor_scales:
            return accumulate.scaled_in_the_call(self.graph, site, self.weights)
        return accumulate.of_tensors(self.graph, site)

    def _calling(self, call: FusedCall) -> Lowering:
        def lowering(state: Evaluation) -> evaluate.Values:
            operands = call.operands(state)
            return call.keep(state, *call(operands, self._natively([call], [operands])))

        return lowering

    def _calling_sequence(self, sequence: FusedSequence) -> Lowering:
        def lowering(state: Evaluation) -> evaluate.Values:
            operands = sequence.operands(state)
            results = sequence(operands, self._natively(sequence.calls, operands))
            return sequence.keep(state, results)

        return lowering

    def _natively(self, calls: Sequence[FusedCall], operands: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the kernels are to run calls whose weights are packed, or have to be for it."""
        if self._fuse is Fuse.NOTHING or not all(call.is_native for call in calls):
            return False
        if self._packs_all or any(call.is_worth_packing for call in calls):
            return True
        return all("packed" in each for each in operands)


def program_by_site(binding: Binding, params: Any) -> Program:
    """A program whose sites each show their result, by the native kernels where they are faster."""
    fuse = Fuse.SITES if native.runs_int8_here() else Fuse.NOTHING
    return Program(binding, params, fuse)
