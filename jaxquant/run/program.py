"""The int8 program of one graph: which equations run, and the rules for the int8 sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, jax_shim
from jaxquant.graph.primitives import Channels
from jaxquant.plan import layout
from jaxquant.plan.bind import Int8Site, bind
from jaxquant.plan.epilogue import channel_axes, output_channels
from jaxquant.plan.liveness import float_leaves, live_equations
from jaxquant.plan.plan import Plan
from jaxquant.run import int8
from jaxquant.run.quantized import QuantizedTensors


class Program:
    """Evaluates a graph with its int8 sites replaced."""

    def __init__(self, graph: ir.Graph, plan: Plan, params: Any):
        self.graph = graph
        self.binding = bind(graph, plan)
        paths = layout.leaf_paths(graph, params)
        self.slots = layout.weight_slots(graph, self.binding.sites, paths)
        self.equations = live_equations(graph, self.binding)[0]
        leaves = float_leaves(graph, self.binding)
        self._float_paths = layout.float_paths(leaves, paths, self.slots)
        self._by_index = {
            graph.producer[site.epilogue.output].index: site for site in self.binding.sites
        }

    def run(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> evaluate.Environment:
        """Evaluate the program; `inputs` are the flattened model inputs."""
        leaves = {
            var: layout.get(qparams["params"], path) for var, path in self._float_paths.items()
        }
        env = evaluate.Environment(self.graph, leaves, inputs)
        quantized = QuantizedTensors(env, self.binding, qparams["tensors"])

        def rule(eqn: ir.Equation) -> Sequence[Any]:
            if eqn.index in self._by_index:
                return [self._accumulate(self._by_index[eqn.index], qparams, env, quantized)]
            if eqn.index in self.binding.selects:
                return [quantized.wide(var) for var in eqn.outputs]
            if eqn.index in self.binding.decisions:
                return _decide(eqn, quantized)
            if eqn.index in self.binding.forms.reads_int8:
                return evaluate.apply(quantized, eqn)
            return evaluate.apply(env, eqn)

        return evaluate.run(env, self.equations, rule)

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
        operands = [quantized.int8(v) for v in site.operands]
        computed_scale = None
        if site.name in self.slots:
            weight = layout.get(qparams["params"], self.slots[site.name].int8)
            operands.insert(site.weight_position, weight)
        elif site.weight is not None:
            axes = channel_axes(self.graph, site, eqn)
            weight, scale = int8.quantize_weight(env.wide(site.weight), axes)
            operands.insert(site.weight_position, weight)
            channels = output_channels(self.graph, site, eqn)
            computed_scale = _along(scale, channels, len(self.graph.shape(eqn.outputs[0])))
        elif len(operands) == 1 and len(eqn.inputs) == 2:  # a tensor with itself
            operands = operands * 2
        value = int8.accumulate(eqn, operands).astype(jnp.float32)
        if computed_scale is not None:
            value = value * computed_scale
        return _epilogue(int8_site, value, qparams["sites"][site.name])


def _epilogue(site: Int8Site, value: jax.Array, arrays: Mapping[str, jax.Array]) -> jax.Array:
    for eqn in site.epilogue.movements:
        (value,) = jax_shim.bind(eqn.primitive, [value], dict(eqn.params))
    channels = site.epilogue.channels
    value = value * _along(arrays["multiplier"], channels, value.ndim)
    if "bias" in arrays:
        value = value + _along(arrays["bias"], channels, value.ndim)
    return value


def _decide(eqn: ir.Equation, quantized: QuantizedTensors) -> Sequence[Any]:
    """argmax and comparisons: on int8 where the scales agree, else on the dequantized values."""
    operands = eqn.input_vars
    if len(operands) == len(eqn.inputs) and all(
        quantized.shares_scale(operands[0], v) for v in operands
    ):
        values = [quantized.int8(v) for v in operands]
        return jax_shim.bind(eqn.primitive, values, dict(eqn.params))
    return evaluate.apply(quantized, eqn)


def _along(vector: jax.Array, channels: Channels, rank: int) -> jax.Array:
    """Place [C] along the channel axes of a tensor with `rank` axes; size 1 elsewhere."""
    order = sorted(range(len(channels.axes)), key=lambda k: channels.axes[k])
    value = vector.reshape(channels.sizes).transpose(order)
    shape = [1] * rank
    for k in order:
        shape[channels.axes[k]] = channels.sizes[k]
    return value.reshape(shape)
