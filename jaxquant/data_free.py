"""Quantization without calibration data: dynamic int8, and weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxquant.analysis.larger import warn_if_larger
from jaxquant.analysis.poor import warn_if_poor
from jaxquant.calibration.data import iterate
from jaxquant.calibration.dependence import check_independence
from jaxquant.graph.batch_sizes import trace_with_batch_sizes
from jaxquant.graph.checks import check_model, check_no_randomness, check_weights
from jaxquant.graph.model import FloatModel
from jaxquant.keywords import named
from jaxquant.plan.config import DEFAULT_OP_TYPES, QuantConfig, check_flag
from jaxquant.plan.float_tables import float_tables
from jaxquant.plan.make import make_plan
from jaxquant.plan.modes import DYNAMIC, WEIGHT_ONLY
from jaxquant.plan.rules import Rule
from jaxquant.plan.segments import cut_scans
from jaxquant.progress import Progress
from jaxquant.recover.compare import Comparison
from jaxquant.report.make import make_report
from jaxquant.report.sqnr import UNKNOWN, measure_quality
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.program import program_by_site
from jaxquant.run.qapply import Code, QuantizedApply
from jaxquant.weights.quantize import quantize_params


@named
def quant_dynamic(
    params: Any,
    apply_fn: Callable[..., Any],
    example: Any,
    *,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    weight_quantize_type: str = "channel_wise_abs_max",
    activation_quantize_type: str = "asymmetric",
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    rules: Sequence[Rule] = (),
    select: Any = None,
    allow_batch_dependence: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Quantize a float model to int8 with activation scales that are computed in each call.

    Needs no calibration data, and no threshold can be wrong for an input that calibration did not
    see; in exchange every call looks for the largest |x| of each tensor that it quantizes, and
    tensors between sites stay float.  Weights are those of `jaxquant.quant_post`, and so are the
    names, the skips, the epilogues and the report.

    There is a scale for each row of a dot's operand (each token of a transformer: what one output
    element sums over) and for each sample and feature group of a convolution's input.  So what a
    sample gives does not depend on the others of its batch, and a depthwise convolution has a scale
    for each channel.  Rows that meet a weight have a zero point too, so that their integers take
    256 steps from the least to the largest x; all others are symmetric, scale = the largest
    |x| / 127.

    Args:
      params: pytree of float arrays, as for `jaxquant.quant_post`.
      apply_fn: a pure function `apply_fn(params, *inputs)` in inference mode.
      example: inputs to trace with; any batch size will do later.  Either a data set as
        `jaxquant.quant_post` takes it, of which the first batch is used (an array; a tuple of
        arrays for several arguments; a dict is one argument), or `jax.ShapeDtypeStruct`s in their
        place.  With arrays the report has the SQNR that was measured on them.
      quantizable_op_type: the kinds that become int8: "conv2d", "depthwise_conv2d", "mul" (a dot
        with a weight), "lookup_table" (an embedding), and if asked for "conv2d_transpose" and
        "matmul" (two activations).
      weight_quantize_type: "channel_wise_abs_max" or "abs_max".
      activation_quantize_type: "asymmetric" or "symmetric": zero points for none.
      skip, skip_first_last: what stays float, as for `jaxquant.quant_post`.
      rules: settings for some of the sites, each a `jaxquant.Rule`: here `dtype` alone.
      select: what of an item of `example` is given to `apply_fn`.
      allow_batch_dependence: as for `jaxquant.quant_post`.
      progress: show what is being done, as `jaxquant.quant_post`.

    Returns:
      `(qparams, qapply)`, as `jaxquant.quant_post`.

    Raises:
      ValueError: an argument is not valid, `example` is empty or does not fit `apply_fn`, a weight
        is not finite, a skip pattern matches nothing, or nothing is there to quantize.
      TypeError: a parameter is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant
      >>> params = {"w": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["w"])
      >>> shape = jax.ShapeDtypeStruct((1, 8), jnp.float32)
      >>> qparams, qapply = jaxquant.quant_dynamic(params, apply_fn, shape)
      >>> qapply(qparams, jnp.ones((16, 8))).shape
      (16, 4)
      >>> qapply.report().rows[0]["mode"]
      'int8 (dynamic)'
    """
    config = QuantConfig(
        algo="abs_max",
        quantizable_op_type=quantizable_op_type,
        weight_quantize_type=weight_quantize_type,
        activation_quantize_type=activation_quantize_type,
        recover=(),
        skip=skip,
        skip_first_last=skip_first_last,
        rules=rules,
        mode=DYNAMIC,
    )
    with Progress("quant_dynamic", progress) as shown:
        inputs = _inputs(example, select)
        return _quantize(params, apply_fn, inputs, config, allow_batch_dependence, shown)


@named
def quant_weights(
    params: Any,
    apply_fn: Callable[..., Any],
    example: Any,
    *,
    weight_bits: int = 8,
    group_size: int | None = None,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    rules: Sequence[Rule] = (),
    select: Any = None,
    allow_batch_dependence: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Store the weights of a float model as integers; it goes on computing in its own dtype.

    A quarter or an eighth of the memory of float32, for models whose weights are the most of it.
    Each weight is dequantized in the call, in float32 and then to the dtype of the operation; on
    one CPU device that of a dot a few rows at a time, so that memory holds the integers alone.
    Dots of up to 16 rows are native kernels there, which sum in float32 (docs/native_kernels.md).

    Weights are symmetric, on [-127, 127] or [-7, 7], scale = the largest |w| / 127 or / 7.  With a
    `group_size` that many neighbours share a scale: along the axes of the weight that are summed
    over, flattened, so that the last group of a channel holds what is left and no size has to
    divide.  Four bits want groups: 128 or fewer.

    Args:
      params: pytree of float arrays, as for `jaxquant.quant_post`.
      apply_fn: a pure function `apply_fn(params, *inputs)` in inference mode.
      example: inputs to trace with, or `jax.ShapeDtypeStruct`s, as for `jaxquant.quant_dynamic`.
      weight_bits: 8 or 4; two 4-bit integers are packed in a byte.
      group_size: how many weights share a scale; None for one scale per output channel (per row of
        an embedding).
      quantizable_op_type: the kinds whose weights become integers: "conv2d", "depthwise_conv2d",
        "mul" (a dot with a weight), "lookup_table" (an embedding: rows of a matrix by index), and
        if asked for "conv2d_transpose".
      skip, skip_first_last: what stays float, as for `jaxquant.quant_post`.
      rules: settings for some of the sites, each a `jaxquant.Rule`: here `dtype` and `weight_bits`.
      select: what of an item of `example` is given to `apply_fn`.
      allow_batch_dependence: as for `jaxquant.quant_post`.
      progress: show what is being done, as `jaxquant.quant_post`.

    Returns:
      `(qparams, qapply)`, as `jaxquant.quant_post`; in `qparams["params"]` a weight is
      {"int8": ..., "scale": ...} or {"int4": ..., "scale": ...}.

    Raises:
      ValueError: an argument is not valid, `example` is empty or does not fit `apply_fn`, a weight
        is not finite, a skip pattern matches nothing, or nothing is there to quantize.
      TypeError: a parameter is not an array.

    Example:
      >>> import jax, jax.numpy as jnp, jaxquant
      >>> params = {"w": jax.random.normal(jax.random.key(0), (256, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (8, 256))
      >>> qparams, qapply = jaxquant.quant_weights(
      ...     params, lambda p, x: x @ p["w"], x, weight_bits=4, group_size=64)
      >>> {name: array.shape for name, array in qparams["params"]["w"].items()}
      {'int4': (128, 4), 'scale': (4, 4)}
      >>> qapply.report().rows[0]["mode"]
      'int4 weights'
    """
    config = QuantConfig(
        algo="abs_max",
        quantizable_op_type=quantizable_op_type,
        recover=(),
        skip=skip,
        skip_first_last=skip_first_last,
        rules=rules,
        mode=WEIGHT_ONLY,
        weight_bits=weight_bits,
        group_size=group_size,
    )
    with Progress("quant_weights", progress) as shown:
        inputs = _inputs(example, select)
        return _quantize(params, apply_fn, inputs, config, allow_batch_dependence, shown)


def _inputs(example: Any, select: Any) -> tuple[Any, ...]:
    """The arguments after `params`: of shapes as they are, of a data set its first batch."""
    if not _has_shapes(example):
        return next(iterate(example, batch_nums=1, select=select))
    if select is not None:
        raise ValueError(
            "select picks from items of a data set; leave it out where you pass shapes"
        )
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _has_shapes(tree: Any) -> bool:
    containers = (tuple, list, dict)  # a generator and other sources are not looked into
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: not isinstance(x, containers))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _quantize(
    params: Any,
    apply_fn: Callable[..., Any],
    inputs: tuple[Any, ...],
    config: QuantConfig,
    allow_batch_dependence: bool,
    progress: Progress,
) -> tuple[dict[str, Any], QuantizedApply]:
    check_flag("allow_batch_dependence", allow_batch_dependence)
    check_model(params, apply_fn)
    source = FloatModel(apply_fn, params)
    with progress.stage("tracing"):
        model = trace_with_batch_sizes(source, inputs)
        check_no_randomness(model.graph)
        check_weights(model.graph, model.sites, params)
        config = config.with_rules(float_tables(model, params))
        if not allow_batch_dependence:
            check_independence(source, inputs, fast_convolutions)
        if (cut := cut_scans(source, model, config, inputs)) is not None:
            source, model, config = cut.source, cut.model, cut.resolved(config)
        binding = make_plan(model, None, config)
    with progress.stage("quantizing weights"):
        qparams = quantize_params(binding, source.params)
        program = program_by_site(binding, source.params)
    with progress.stage("comparing"):
        known = not _has_shapes(inputs)  # of an example that is shapes alone there is nothing
        comparison = Comparison(program, source.params)
        quality = measure_quality(comparison, qparams, inputs) if known else UNKNOWN
        report = make_report(program, source.params, qparams, quality, recovery={})
    plan = binding.whole_plan
    warn_if_poor(source, plan, report, inputs)
    warn_if_larger(params, qparams)
    return qparams, QuantizedApply(Code(apply_fn, params, source.cuts), plan, report, inputs)
