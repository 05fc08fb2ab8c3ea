"""One convolution or dot as a model of its own, in float and in int8.

The model holds what int8 spares the neighbours too: in a whole model, the operation before a site
writes integers where the site reads such, and what a site gives is mostly quantized behind it.
Without these two, forms that make a network faster by XLA on CPU look slower than float.  (A native
kernel quantizes its result itself in a model; here XLA does so behind it, which is in float's
favour.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxquant.backends.platforms import PLATFORMS
from jaxquant.calibration.observations import Observations, TensorStats
from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.model import trace_model
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.binding import Binding, Int8Site
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.make import make_plan
from jaxquant.plan.observed import observed_tensors
from jaxquant.run.calls import goes_on
from jaxquant.run.qapply import QuantizedApply
from jaxquant.run.source import Code
from jaxquant.weights.quantize import quantize_params

_PATTERN = 4093  # random values that fill an array of any size: neither speed depends on them


class Surroundings(NamedTuple):
    """What a site has to do with its neighbours.

    Attributes:
      is_computed: for each operand, whether the model computes it; else it is a model input.
      has_zero_point: for each operand, whether its int8 form has a zero point that is not 0.
      is_quantized: whether the result is quantized, as it is or behind elementwise operations.
      is_native: whether the native kernels have the site, with what its epilogue absorbs.
    """

    is_computed: tuple[bool, ...]
    has_zero_point: tuple[bool, ...]
    is_quantized: bool
    is_native: bool = True


class OneSite(NamedTuple):
    """A site as a model.

    Attributes:
      apply_fn: `apply_fn(params, *inputs)`, the site in its surroundings.
      params: {"weight": its weight}; {} where no parameter is in that, or it has none.
      inputs: its operands that depend on the model's inputs.
      has_zero_point: as of its surroundings.
      is_native: as of its surroundings.
      weight_quantize_type: see `jaxquant.quant_post`.
    """

    apply_fn: Callable[..., jax.Array]
    params: dict[str, jax.Array]
    inputs: tuple[jax.Array, ...]
    has_zero_point: tuple[bool, ...]
    is_native: bool
    weight_quantize_type: str


class BothForms(NamedTuple):
    """Both forms, compiled when they are first called: `result = program(*arguments, result)`.

    They take the same arguments, so that handing these over costs both the same, and write over the
    result of a call before (first over an array like `result`): else the time that the system takes
    to hand out new memory, for large ones as long as the arithmetic, would come and go by chance.
    """

    in_float: Callable[..., Any]
    in_int8: Callable[..., Any]
    arguments: tuple[Any, ...]
    result: jax.ShapeDtypeStruct


def surroundings(graph: ir.Graph, binding: Binding, int8_site: Int8Site) -> Surroundings:
    """What surrounds an int8 site in a plan: where its operands come from and its result goes."""
    operands = tuple(dict.fromkeys(int8_site.site.operands))
    # Movements are seen through: what is moved comes from where its values do.
    roots = [primitives.movement_root(graph, var) for var in operands]
    return Surroundings(
        tuple(root not in graph.inputs for root in roots),
        tuple(binding.zero_points[var] != 0 for var in operands),
        _becomes_int8(graph, binding, int8_site.epilogue.output),
        goes_on(PLATFORMS, graph, int8_site, binding.zero_points),
    )


def _becomes_int8(graph: ir.Graph, binding: Binding, var: ir.Var) -> bool:
    seen, stack = {var}, [var]
    while stack:
        current = stack.pop()
        if current in binding.forms.int8:
            return True
        for eqn in graph.consumers.get(current, ()):
            # Elementwise operations and movements are fused behind a site.
            if primitives.is_elementwise(eqn) or primitives.is_movement(graph, eqn):
                stack.extend(v for v in eqn.outputs if v not in seen)
                seen.update(eqn.outputs)
    return False


def key(graph: ir.Graph, site: Site, around: Surroundings) -> tuple[Any, ...]:
    """Equal for sites that are equal as models, but for their values."""
    eqn = graph.equations[site.equation]
    operands = tuple((graph.shape(x), str(graph.dtype(x)), graph.is_static(x)) for x in eqn.inputs)
    params = tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
    # What is stored is packed beforehand; what is computed is packed in each call.
    stored = not site.computes_weight
    return (eqn.name, params, operands, stored, around)


def one_site(
    graph: ir.Graph, site: Site, around: Surroundings, weight_quantize_type: str
) -> OneSite:
    """A site as a model, with random values."""
    eqn, weight = graph.equations[site.equation], site.weight
    stored = site.stored_weight is not None
    activations = tuple(dict.fromkeys(site.operands))

    def apply_fn(params: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
        # What is around a site decides which kernels run it: an input that is computed comes in
        # float.
        read = [_compute(x) if c else x for x, c in zip(inputs, around.is_computed, strict=True)]
        values: dict[ir.Var, Any] = dict(zip(activations, read, strict=True))
        if weight is not None:
            values[weight] = params["weight"] if stored else _constant(graph, weight)
        operands = [x.value if isinstance(x, ir.Literal) else values[x] for x in eqn.inputs]
        (result,) = jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
        # Rounded behind, as the next site would have it.
        return _quantize(result) if around.is_quantized else result

    params = {"weight": _filled(graph, weight)} if weight is not None and stored else {}
    inputs = tuple(_filled(graph, var) for var in activations)
    return OneSite(
        apply_fn, params, inputs, around.has_zero_point, around.is_native, weight_quantize_type
    )


def _compute(x: jax.Array) -> jax.Array:
    """Any elementwise operation."""
    return lax.max(x, jnp.asarray(-0.5, x.dtype))


def _quantize(x: jax.Array) -> jax.Array:
    scaled = (x * jnp.asarray(16, x.dtype)).astype(jnp.float32)
    rounded = lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN)
    return lax.clamp(jnp.float32(-128), rounded, jnp.float32(127)).astype(jnp.int8)


def both_forms(model: OneSite) -> BothForms:
    """The site in float, as a float site of `qapply` runs, and in int8, as `qapply` runs it.

    Quantizing the operands is part of the latter; the weight is packed beforehand.
    """
    qparams, qapply = quantized(model)

    def in_float(params: Any, qparams: Any, inputs: Any, result: Any) -> jax.Array:
        return model.apply_fn(params, *inputs)

    def in_int8(params: Any, qparams: Any, inputs: Any, result: Any) -> jax.Array:
        return qapply(qparams, *inputs)

    # The result of a call before is donated, so that no call waits for memory.
    compiled = functools.partial(jax.jit, keep_unused=True, donate_argnums=3)
    arguments = (model.params, qapply.prepare(qparams), model.inputs)
    result = jax.eval_shape(model.apply_fn, model.params, *model.inputs)
    return BothForms(compiled(in_float), compiled(in_int8), arguments, result)


def quantized(model: OneSite) -> tuple[dict[str, Any], QuantizedApply]:
    """The site's int8 model, for inputs in [-1, 1], or in [0, 1] where they have a zero point."""
    config = QuantConfig(
        algo="abs_max",
        quantizable_op_type=kinds.DOT_KINDS,
        weight_quantize_type=model.weight_quantize_type,
        recover=(),
    )
    traced = trace_model(model.apply_fn, model.params, model.inputs)
    names = observed_tensors(traced, config).names
    # No data: the ranges are those of the values that it will be timed on.
    stats = map(_stats, model.has_zero_point)
    # One batch that nobody saw, of the values that it is timed on.
    observations = Observations(
        dict(zip(names, stats, strict=True)), batches=1, samples=1, examples=(model.inputs,)
    )
    binding = make_plan(traced, observations, config)
    qparams = quantize_params(binding, model.params)
    qapply = QuantizedApply(Code(model.apply_fn, model.params), binding.plan, None, model.inputs)
    # Where the model has no kernel for the site, timing one would tell of another.
    return qparams, qapply if model.is_native else qapply.with_backend("xla")


def _stats(has_zero_point: bool) -> TensorStats:
    low = 0.0 if has_zero_point else -1.0
    return TensorStats(np.zeros(2048, np.uint64), 2.0**-11, low, 1.0, 1.0, 1)


def _filled(graph: ir.Graph, var: ir.Var) -> jax.Array:
    values = np.random.default_rng(0).uniform(-1, 1, _PATTERN).astype(graph.dtype(var))
    # Random, since a constant could be folded away; few of them, repeated.
    return jax.device_put(np.resize(values, graph.shape(var)))


def _constant(graph: ir.Graph, weight: ir.Var) -> jax.Array:
    """A weight of constants, which XLA computes when it compiles."""
    shape = graph.shape(weight)
    return lax.broadcasted_iota(graph.dtype(weight), shape, len(shape) - 1)
