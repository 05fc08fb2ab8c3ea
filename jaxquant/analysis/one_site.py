"""One convolution or dot as a model of its own, in float and in int8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.config import QuantConfig
from jaxquant.graph import ir, jax_shim, kinds
from jaxquant.graph.sites import Site
from jaxquant.graph.trace import trace
from jaxquant.plan.liveness import is_computed_weight
from jaxquant.plan.make import make_plan, observed_tensors
from jaxquant.quantize.weights import quantize_params
from jaxquant.run.qapply import QuantizedApply

_PATTERN = 4093  # random values that fill an array of any size: neither speed depends on them


class OneSite(NamedTuple):
    """A site as a model.

    Attributes:
      apply_fn: `apply_fn(params, *inputs)`, its equation alone.
      params: {"weight": its weight}; {} where no parameter is in that, or it has none.
      inputs: its operands that depend on the model's inputs.
      has_zero_point: for each of these, whether its int8 form has a zero point that is not 0.
      weight_quantize_type: see `jaxquant.quant_post`.
    """

    apply_fn: Callable[..., jax.Array]
    params: dict[str, jax.Array]
    inputs: tuple[jax.Array, ...]
    has_zero_point: tuple[bool, ...]
    weight_quantize_type: str


class Programs(NamedTuple):
    """Both forms, compiled when they are first called: `result = program(*arguments, result)`.

    They take the same arguments, so that handing these over costs both the same, and write over the
    result of a call before (first over an array like `result`): else the time that the system takes
    to hand out new memory, for large ones as long as the arithmetic, would come and go by chance.
    """

    in_float: Callable[..., Any]
    in_int8: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: jax.ShapeDtypeStruct


def key(graph: ir.Graph, site: Site, has_zero_point: Sequence[bool]) -> tuple[Any, ...]:
    """Equal for sites that are equal as models, but for their values."""
    eqn = graph.equations[site.equation]
    operands = tuple((graph.shape(x), str(graph.dtype(x)), graph.is_static(x)) for x in eqn.inputs)
    params = tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
    stored = not is_computed_weight(graph, site.weight)
    return (eqn.name, params, operands, stored, tuple(has_zero_point))


def one_site(
    graph: ir.Graph, site: Site, has_zero_point: Sequence[bool], weight_quantize_type: str
) -> OneSite:
    """A site as a model, with random values."""
    eqn, weight = graph.equations[site.equation], site.weight
    stored = weight is not None and not is_computed_weight(graph, weight)
    activations = tuple(dict.fromkeys(site.operands))

    def apply_fn(params: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
        values: dict[ir.Var, Any] = dict(zip(activations, inputs, strict=True))
        if weight is not None:
            values[weight] = params["weight"] if stored else _computed(graph, weight)
        operands = [x.value if isinstance(x, ir.Literal) else values[x] for x in eqn.inputs]
        (result,) = jax_shim.bind(eqn.primitive, operands, dict(eqn.params))
        return result

    params = {"weight": _filled(graph, weight)} if weight is not None and stored else {}
    inputs = tuple(_filled(graph, var) for var in activations)
    return OneSite(apply_fn, params, inputs, tuple(has_zero_point), weight_quantize_type)


def programs(model: OneSite) -> Programs:
    """The site in float, as a float site of `qapply` runs, and in int8, as `qapply` runs it.

    Quantizing the inputs is part of the latter; the weight is packed beforehand.
    """
    qparams, qapply = quantized(model)

    def in_float(params: Any, qparams: Any, inputs: Any, result: Any) -> jax.Array:
        return model.apply_fn(params, *inputs)

    def in_int8(params: Any, qparams: Any, inputs: Any, result: Any) -> jax.Array:
        return qapply(qparams, *inputs)

    compiled = functools.partial(jax.jit, keep_unused=True, donate_argnums=3)
    arguments = (model.params, qapply.prepare(qparams), model.inputs)
    result = jax.eval_shape(model.apply_fn, model.params, *model.inputs)
    return Programs(compiled(in_float), compiled(in_int8), arguments, result)


def quantized(model: OneSite) -> tuple[dict[str, Any], QuantizedApply]:
    """The site's int8 model, for inputs in [-1, 1], or in [0, 1] where they have a zero point."""
    config = QuantConfig(
        algo="abs_max",
        quantizable_op_type=kinds.DOT_KINDS,
        weight_quantize_type=model.weight_quantize_type,
        recover=(),
    )
    graph = trace(model.apply_fn, model.params, model.inputs)
    names = observed_tensors(graph, config)
    stats = map(_stats, model.has_zero_point)
    observations = Observations(
        dict(zip(names, stats, strict=True)), batches=1, samples=1, examples=(model.inputs,)
    )
    plan = make_plan(graph, observations, config)
    qparams = quantize_params(graph, plan, model.params)
    return qparams, QuantizedApply(model.apply_fn, plan, model.params, None, model.inputs)


def _stats(has_zero_point: bool) -> TensorStats:
    low = 0.0 if has_zero_point else -1.0
    return TensorStats(np.zeros(2048, np.uint64), 2.0**-11, low, 1.0, 1.0, 1)


def _filled(graph: ir.Graph, var: ir.Var) -> jax.Array:
    values = np.random.default_rng(0).uniform(-1, 1, _PATTERN)
    return jax.device_put(np.resize(values, graph.shape(var)).astype(graph.dtype(var)))


def _computed(graph: ir.Graph, weight: ir.Var) -> jax.Array:
    """A weight of constants, which XLA computes when it compiles."""
    shape = graph.shape(weight)
    return jax.lax.broadcasted_iota(graph.dtype(weight), shape, len(shape) - 1)
