"""The int8 program of one graph: which equations run, and the rules for the int8 sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import evaluate, ir, jax_shim
from jaxquant.graph.primitives import Channels
from jaxquant.plan import layout
from jaxquant.plan.liveness import float_leaves, live_equations
from jaxquant.plan.plan import Int8Site, Plan, int8_sites
from jaxquant.run import int8


class Program:
    """Evaluates a graph with its int8 sites replaced."""

    def __init__(self, graph: ir.Graph, plan: Plan, params: Any):
        self.graph = graph
        self.sites = int8_sites(graph, plan)
        paths = layout.leaf_paths(graph, params)
        self.slots = layout.weight_slots(graph, self.sites, paths)
        self._equations = live_equations(graph, self.sites)[0]
        self._float_paths = layout.float_paths(float_leaves(graph, self.sites), paths, self.slots)

    def run(self, qparams: Mapping[str, Any], inputs: Sequence[Any]) -> evaluate.Environment:
        """Evaluate the program; `inputs` are the flattened model inputs."""
        leaves = {
            var: layout.get(qparams["params"], path) for var, path in self._float_paths.items()
        }
        quantized = _QuantizedTensors(self.graph, self.sites, qparams["tensors"])
        rules = {
            self.graph.producer[site.epilogue.output].index: self._rule(site, qparams, quantized)
            for site in self.sites
        }
        return evaluate.evaluate(
            self.graph, leaves, inputs, equations=self._equations, replace=rules
        )

    def _rule(
        self, site: Int8Site, qparams: Mapping[str, Any], quantized: _QuantizedTensors
    ) -> evaluate.Replace:
        def rule(env: evaluate.Environment, _: ir.Equation) -> Sequence[Any]:
            assert site.site.activation is not None
            weight = layout.get(qparams["params"], self.slots[site.site.name].int8)
            activation = quantized.read(env, site.site.activation)
            eqn = self.graph.equations[site.site.equation]
            accumulator = _integer_op(eqn, activation, weight, site.site.weight_position)
            arrays = qparams["sites"][site.site.name]
            return [self._epilogue(site, accumulator, arrays)]

        return rule

    def _epilogue(
        self, site: Int8Site, accumulator: jax.Array, arrays: Mapping[str, jax.Array]
    ) -> jax.Array:
        value = accumulator.astype(jnp.float32)
        for eqn in site.epilogue.movements:
            (value,) = jax_shim.bind(eqn.primitive, [value], dict(eqn.params))
        channels = site.epilogue.channels
        value = value * _along(arrays["multiplier"], channels, value.ndim)
        if "bias" in arrays:
            value = value + _along(arrays["bias"], channels, value.ndim)
        return value


class _QuantizedTensors:
    """The int8 values of an evaluation, each made once."""

    def __init__(self, graph: ir.Graph, sites: Sequence[Int8Site], tensors: Mapping[str, Any]):
        self._graph = graph
        self._inv_scales = {s.root: tensors[s.tensor]["inv_scale"] for s in sites}
        self._values: dict[ir.Var, jax.Array] = {}

    def read(self, env: evaluate.Environment, var: ir.Var) -> jax.Array:
        """`var` in int8: quantized at its root, then rearranged in int8."""
        if var not in self._values:
            if var in self._inv_scales:
                value = int8.quantize(env.wide(var), self._inv_scales[var])
            else:
                eqn = self._graph.producer[var]
                source = self.read(env, eqn.input_vars[0])
                (value,) = jax_shim.bind(eqn.primitive, [source], dict(eqn.params))
            self._values[var] = value
        return self._values[var]


def _integer_op(
    eqn: ir.Equation, activation: jax.Array, weight: jax.Array, weight_position: int
) -> jax.Array:
    if eqn.name == "conv_general_dilated":
        return int8.conv(activation, weight, eqn.params)
    operands = (weight, activation) if weight_position == 0 else (activation, weight)
    return int8.dot(operands, eqn.params)


def _along(vector: jax.Array, channels: Channels, rank: int) -> jax.Array:
    """Place [C] along the channel axes of a tensor with `rank` axes, size 1 elsewhere."""
    order = sorted(range(len(channels.axes)), key=lambda k: channels.axes[k])
    value = vector.reshape(channels.sizes).transpose(order)
    shape = [1] * rank
    for k in order:
        shape[channels.axes[k]] = channels.sizes[k]
    return value.reshape(shape)
