"""Plans and int8 models whose scales are powers of two, so that their arithmetic is exact."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.graph import evaluate, ir
from jaxquant.graph.model import trace_model
from jaxquant.plan.binding import Binding
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.make import make_plan
from jaxquant.plan.observed import observed_tensors
from jaxquant.plan.plan import Plan, SitePlan
from jaxquant.run.qapply import QuantizedApply
from jaxquant.run.source import Code
from jaxquant.weights.quantize import quantize_params
from tests import networks


def plan_of(apply_fn, params, *inputs, **config) -> Plan:
    """The plan of a function, with a threshold of 1 for every tensor; compiles nothing."""
    model = trace_model(apply_fn, params, inputs)
    return make_plan(model, *_observed(model, inputs, lambda name: 1.0, config)).whole_plan


def binding_of(apply_fn, params, *inputs, **config) -> Binding:
    """The plan of a function bound to its graph; compiles nothing."""
    model = trace_model(apply_fn, params, inputs)
    return make_plan(model, *_observed(model, inputs, lambda name: 1.0, config))


def _observed(model, inputs, abs_max: Callable[[str], float], config):
    options = QuantConfig(**{**networks.OPTIONS, "is_full_quantize": True, **config})
    stats = {name: _stats(abs_max(name)) for name in observed_tensors(model, options).names}
    return Observations(stats, 1, 1, (inputs,)), options


def _stats(bound: float) -> TensorStats:
    return TensorStats(np.zeros(2048, np.uint64), 1.0, -bound, bound, bound, 1)


@dataclasses.dataclass(frozen=True)
class Int8Model:
    """A quantized function; `scale[tensor]` is a power of two."""

    plan: Plan
    qparams: Any
    qapply: QuantizedApply

    def __call__(self, *inputs: Any) -> Any:
        return jax.tree.map(np.asarray, self.qapply(self.qparams, *inputs))

    @functools.cached_property
    def scale(self) -> dict[str, float]:
        return {tensor.name: tensor.scale for tensor in self.plan.tensors}

    @functools.cached_property
    def sites(self) -> dict[str, SitePlan]:
        return {site.name: site for site in self.plan.sites}

    def input_scale(self, site: str, operand: int = 0) -> float:
        return self.scale[self.sites[site].inputs[operand]]


def quantize(apply_fn, params, *inputs, **config) -> Int8Model:
    """Full quantization unless `config` says else; thresholds are 127 times a power of two."""
    model = trace_model(apply_fn, params, inputs)
    options = QuantConfig(**{**networks.OPTIONS, "is_full_quantize": True, **config})
    bounds = _bounds(model.graph, observed_tensors(model, options).tensors, params, inputs)
    binding = make_plan(model, *_observed(model, inputs, bounds.__getitem__, config))
    qparams = quantize_params(binding, params)
    plan = binding.whole_plan
    return Int8Model(plan, qparams, QuantizedApply(Code(apply_fn, params), plan, None))


def _bounds(graph: ir.Graph, tensors: dict[str, ir.Var], params, inputs) -> dict[str, float]:
    @jax.jit
    def run(params, inputs):
        leaves = dict(zip(graph.leaves, jax.tree.leaves(params)))
        env = evaluate.evaluate(graph, leaves, jax.tree.leaves(inputs))
        return {name: abs(env.read(var)).max() for name, var in tensors.items()}

    ranges = {name: float(value) for name, value in run(params, inputs).items()}
    return {name: 127 * 2.0 ** _exponent(value) for name, value in ranges.items()}


def _exponent(abs_max: float) -> int:
    return math.ceil(math.log2(abs_max / 127)) if abs_max else 0
