"""The int8 program of one graph: which equations run, and the rules for the int8 sites."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant import native
from jaxquant.graph import evaluate, ir
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import jaxprs
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site, bind
from jaxquant.plan.epilogue import output_channels
from jaxquant.plan.groups import group_layout
from jaxquant.plan.liveness import float_leaves, live_equations
from jaxquant.plan.modes import MODES
from jaxquant.plan.plan import Plan
from jaxquant.run import dynamic, int8, nonfinite, weight_only
from jaxquant.run.dequantize import StoredWeight, dequantize_weight
from jaxquant.run.epilogue import epilogue
from jaxquant.run.fused import FusedCall
from jaxquant.run.fusion import Fuse, find_chains
from jaxquant.run.pooling import find_early_pools
from jaxquant.run.quantized import QuantizedTensors
from jaxquant.run.sequences import FusedSequence, Results, find_sequences, in_order


class Program:
    """Evaluates a graph with its int8 sites replaced.

    Args:
      graph: the traced model.
      plan: which sites are int8.
      params: the parameters or their shapes.
      fuse: what the native kernels take over.
      packs_all: False to leave to XLA what takes the kernels longer because they have to pack its
        weight first.
    """

    def __init__(
        self,
        graph: ir.Graph,
        plan: Plan,
        params: Any,
        fuse: Fuse = Fuse.NOTHING,
        packs_all: bool = True,
    ):
        self.graph = graph
        self.plan = plan
        self.mode = MODES[plan.mode]
        self.binding = bind(graph, plan)
        paths = layout.leaf_paths(graph, params)
        self.slots = layout.weight_slots(graph, [s.site for s in self.binding.sites], paths, plan)
        live = live_equations(graph, self.binding)
        self.equations = live.equations
        self.restored = {var: self.binding.restorable[var] for var in live.restored}
        leaves = float_leaves(graph, self.binding)
        self.float_paths = layout.float_paths(leaves, paths, self.slots)
        self._origins = nonfinite.find_origins(graph, self.binding)
        self._by_index = {
            graph.producer[site.epilogue.output].index: site for site in self.binding.sites
        }
        if not self.mode.tensor_scales:
            fuse = Fuse.NOTHING
        self._fuse = fuse
        self._packs_all = packs_all
        self.early = find_early_pools(graph, self.binding, self.equations)
        pools = {eqn.index for eqn in self.early.values()}
        running = [eqn for eqn in self.equations if eqn.index not in pools]
        chains = find_chains(graph, self.binding, running, self.early, fuse)
        self._fused = {k: FusedCall(graph, c, self.binding.zero_points) for k, c in chains.items()}
        self._absorbed = {k for c in chains.values() for k in c.members} - set(chains)
        found = find_sequences(graph, self._fused) if fuse is Fuse.CHAINS else []
        self.equations = in_order(self.equations, found, self._fused)
        sequences = [FusedSequence(graph, members, self._fused) for members in found]
        self._sequences = {last: each for each in sequences for last in each.members.chains}

    def run(
        self,
        qparams: Mapping[str, Any],
        inputs: Sequence[Any],
        correct: Callable[[Int8Site, jax.Array], jax.Array] | None = None,
    ) -> evaluate.Environment:
        """Evaluate the program.

        Args:
          qparams: its arrays.
          inputs: the flattened model inputs.
          correct: gives the value to go on with, from that at the end of a site's epilogue; not
            where chains are fused.
        """
        assert correct is None or self._fuse is not Fuse.CHAINS, "a chain goes on behind its site"
        return self._run(qparams, inputs, correct)[0]

    def outputs(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> Any:
        """The model's outputs, in their own pytree; NaN where floats were that int8 cannot hold."""
        env, quantized = self._run(qparams, inputs, None)
        return nonfinite.with_marks(evaluate.outputs(env), quantized.marks)

    def _run(
        self,
        qparams: Mapping[str, Any],
        inputs: Sequence[Any],
        correct: Callable[[Int8Site, jax.Array], jax.Array] | None,
    ) -> tuple[evaluate.Environment, QuantizedTensors]:
        leaves = {
            var: layout.get(qparams["params"], path) for var, path in self.float_paths.items()
        }
        leaves |= {var: self.restore(var, qparams) for var in self.restored}
        env = evaluate.Environment(self.graph, leaves, inputs)
        quantized = QuantizedTensors(
            env, self.binding, qparams["tensors"], self.early, self._origins
        )

        ahead: Results = {}
        rule = functools.partial(self.apply, qparams, env, quantized, ahead=ahead, correct=correct)
        return evaluate.run(env, self.equations, rule), quantized

    def apply(
        self,
        qparams: Mapping[str, Any],
        env: evaluate.Environment,
        quantized: QuantizedTensors,
        eqn: ir.Equation,
        *,
        ahead: Results,
        correct: Callable[[Int8Site, jax.Array], jax.Array] | None = None,
    ) -> Sequence[Any]:
        """The results of one of the program's equations.

        Args:
          qparams: the program's arrays.
          env: what it reads in float.
          quantized: what it reads in int8.
          eqn: one of `equations`.
          ahead: what sequences give before the equations are reached that they stand for; kept
            from one equation to the next.
          correct: as for `run`.
        """
        if eqn.index in self._absorbed:
            return [None]  # part of a fused call further on
        if eqn.index in self._fused:
            call = self._fused[eqn.index]
            value = self._run_fused(eqn.index, qparams, quantized, ahead)
            return [correct(call.chain.site, value) if correct and value is not None else value]
        if eqn.outputs[0] in self.early and env.wide(eqn.inputs[0]) is None:
            return [None]  # there are integers only; else XLA drops the pool of the floats
        if eqn.index in self._by_index:
            site = self._by_index[eqn.index]
            if self.mode.integer:
                value = self._accumulate(site, qparams, env, quantized)
            else:
                value = self._on_dequantized_weight(site.site, qparams, env)
            return [correct(site, value) if correct else value]
        if eqn.index in self.binding.selects:
            return [quantized.wide(var) for var in eqn.outputs]
        if eqn.index in self.binding.decisions:
            return _decide(eqn, quantized)
        if eqn.index in self.binding.forms.reads_int8:
            return evaluate.apply(quantized, eqn)
        return evaluate.apply(env, eqn)

    def restore(self, var: ir.Var, qparams: Mapping[str, Any]) -> jax.Array:
        """A static tensor of `restored`, from the integers of a weight."""
        restored = self.restored[var]
        site = restored.site
        view = layout.weight_view(self.graph, site, self.mode.integer)
        if self.mode.integer:
            slot = self.slots[site.name]
            weight, scale = (
                layout.get(qparams["params"], path) for path in (slot.int8, slot.scale)
            )
            spread = [n if d in view.channels else 1 for d, n in enumerate(view.shape)]
            value = weight.astype(jnp.float32) * (scale.reshape(spread) if scale.ndim else scale)
        else:
            value = dequantize_weight(self._stored_weight(site, view, qparams))
        return restored.apply(self.graph, value.astype(self.graph.dtype(view.var)))

    def _run_fused(
        self,
        index: int,
        qparams: Mapping[str, Any],
        quantized: QuantizedTensors,
        ahead: Results,
    ) -> jax.Array | None:
        """The float output of a fused call, None where nobody reads it; its int8 form is kept."""
        call = self._fused[index]
        if index in self._sequences and index not in ahead:
            sequence = self._sequences[index]
            operands = [
                each.operands(qparams, self._slot(each), quantized, links)
                for each, links in zip(sequence.calls, sequence.members.links, strict=True)
            ]
            ahead.update(sequence(operands, self._natively(sequence, operands)))
        if index in ahead:
            value, as_int8 = ahead[index]
        else:
            given = call.operands(qparams, self._slot(call), quantized)
            value, as_int8 = call(given, self._natively(call, [given]))
        if as_int8 is not None and call.chain.grid is not None:
            quantized.put(call.chain.output, as_int8, call.chain.grid)
        return value

    def _natively(
        self, call: FusedCall | FusedSequence, operands: Sequence[Mapping[str, Any]]
    ) -> bool:
        """Whether the kernels are to run a call whose weights are packed, or have to be for it."""
        if self._packs_all or call.is_worth_packing:
            return True
        return all("packed" in each for each in operands)

    def _slot(self, call: FusedCall) -> layout.WeightSlot:
        return self.slots[call.chain.site.site.name]

    def pack(self, qparams: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The weights of the fused calls as the native kernels read them, by site."""
        packed = {}
        for call in self._fused.values():
            name = call.chain.site.site.name
            packed[name] = call.pack(layout.get(qparams["params"], self._slot(call).int8))
        return packed

    def _accumulate(
        self,
        int8_site: Int8Site,
        qparams: Mapping[str, Any],
        env: evaluate.Environment,
        quantized: QuantizedTensors,
    ) -> jax.Array:
        """An accumulating site: int32 accumulator, epilogue, float32."""
        site = int8_site.site
        eqn = self.graph.equations[site.equation]
        scales: list[jax.Array] = []  # of operands that are scaled in the call
        if self.mode.tensor_scales:
            operands = [quantized.int8(v) for v in site.operands]
            zero_points = [quantized.zero_point(v) for v in site.operands]
        else:
            operands, scales = dynamic.quantize_operands(env, eqn, site.weight)
            zero_points = [0] * len(operands)
        if site.name in self.slots:
            weight = layout.get(qparams["params"], self.slots[site.name].int8)
            operands.insert(site.weight_position, weight)
            value = int8.accumulate(eqn, operands, zero_points).astype(jnp.float32)
        elif site.weight is not None:
            value = self._with_computed_weight(site, eqn, operands[0], zero_points[0], env)
        else:
            if len(operands) == 1 and len(eqn.inputs) == 2:  # a tensor with itself
                operands, zero_points = operands * 2, zero_points * 2
            value = int8.combine(eqn, operands, zero_points).astype(jnp.float32)
        return epilogue(int8_site, value, qparams["sites"][site.name], scales)

    def _on_dequantized_weight(
        self, site: Site, qparams: Mapping[str, Any], env: evaluate.Environment
    ) -> jax.Array:
        """A site that computes in the model's dtype on a weight stored as integers."""
        view = layout.weight_view(self.graph, site, integer=False)
        eqn = self.graph.equations[site.equation]
        weight = self._stored_weight(site, view, qparams)
        return weight_only.apply(env, eqn, site, view, weight)

    def _stored_weight(
        self, site: Site, view: layout.WeightView, qparams: Mapping[str, Any]
    ) -> StoredWeight:
        groups = group_layout(view.shape, view.channels, self.plan.group_size)
        slot = self.slots[site.name]
        integers, scale = (layout.get(qparams["params"], path) for path in (slot.int8, slot.scale))
        return StoredWeight(integers, scale, groups, slot.bits)

    def _with_computed_weight(
        self, site: Site, eqn: ir.Equation, x: jax.Array, zero_point: int, env: evaluate.Environment
    ) -> jax.Array:
        """The sum with a weight that the program computes and quantizes, as float32."""
        assert site.weight is not None
        axes = site.channel_axes
        weight, scale = int8.quantize_weight(env.wide(site.weight), axes)
        operands = [x, weight] if site.weight_position else [weight, x]
        total = int8.accumulate(eqn, operands, [zero_point])
        channels = output_channels(self.graph, site)
        if zero_point:
            offset = zero_point * int8.weight_sums(weight, axes)
            total = total - channels.spread(offset, total.ndim)
        return total.astype(jnp.float32) * channels.spread(scale, total.ndim)


def program_by_site(graph: ir.Graph, plan: Plan, params: Any) -> Program:
    """A program whose sites each show their result, by the native kernels where they are faster."""
    fuse = Fuse.SITES if native.runs_int8_here() else Fuse.NOTHING
    return Program(graph, plan, params, fuse)


def _decide(eqn: ir.Equation, quantized: QuantizedTensors) -> Sequence[Any]:
    """argmax and comparisons: on int8 where the scales agree, else on the dequantized values."""
    operands = eqn.input_vars
    if len(operands) == len(eqn.inputs) and all(
        quantized.shares_scale(operands[0], v) for v in operands
    ):
        values = [quantized.int8(v) for v in operands]
        return jaxprs.bind(eqn.primitive, values, dict(eqn.params))
    return evaluate.apply(quantized, eqn)
