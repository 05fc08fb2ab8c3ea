"""Quantization without thresholds: dynamic int8, and weights alone."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from jaxquant.analysis.larger import warn_if_larger
from jaxquant.analysis.poor import warn_if_poor
from jaxquant.calibration.data import iterate, num_batches
from jaxquant.calibration.dependence import check_independence
from jaxquant.calibration.padding import Mask, Padding
from jaxquant.code_tables import INT
from jaxquant.graph.batch_sizes import trace_with_batch_sizes
from jaxquant.graph.checks import check_model, check_no_randomness, check_weights
from jaxquant.graph.model import FloatModel
from jaxquant.keywords import named
from jaxquant.plan.checks import check_flag
from jaxquant.plan.config import DEFAULT_OP_TYPES, QuantConfig, rule_data
from jaxquant.plan.float_tables import float_tables
from jaxquant.plan.make import make_plan
from jaxquant.plan.modes import DYNAMIC, WEIGHT_ONLY
from jaxquant.plan.rules import Rule
from jaxquant.plan.segments import cut_scans
from jaxquant.plan.sensitive import eight_bit_rules
from jaxquant.progress import Progress
from jaxquant.recover.step import Data
from jaxquant.recover.steps import quantize_and_recover
from jaxquant.report.make import make_report
from jaxquant.report.sqnr import UNKNOWN, measure_quality
from jaxquant.run.float_forms import fast_convolutions
from jaxquant.run.qapply import QuantizedApply
from jaxquant.run.source import Code


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
    # No thresholds are searched: the plan wants an algo all the same.
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
        given = _inputs(example, select)
        return _quantize(params, apply_fn, given, config, allow_batch_dependence, shown)


@named
def quant_weights(
    params: Any,
    apply_fn: Callable[..., Any],
    example: Any,
    *,
    weight_bits: int = 8,
    group_size: int | None = None,
    weight_dtype: str = INT,
    recover: Sequence[str] | None = None,
    quantizable_op_type: Sequence[str] = DEFAULT_OP_TYPES,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    skip: Sequence[str] = (),
    skip_first_last: bool = False,
    rules: Sequence[Rule] = (),
    select: Any = None,
    mask: Mask = None,
    allow_batch_dependence: bool = False,
    progress: bool = True,
) -> tuple[dict[str, Any], QuantizedApply]:
    """Store the weights of a float model as integers; it goes on computing in its own dtype.

    A quarter or an eighth of the memory of float32, for models whose weights are the most of it.
    Each weight is dequantized in the call, in float32 and then to the dtype of the operation; on
    one CPU device that of a dot a few rows at a time, so that memory holds the integers alone.
    Dots are native kernels there, which sum in float32 (docs/native_kernels.md).

    Weights have no zero point.  Those of 8 bits are on [-127, 127], scale = the largest |w| / 127;
    those of 4 bits on [-8, 7], with the scale that clips none of a group or a smaller one, down to
    half of that, where clipping the largest leaves a smaller squared error.
    With a `group_size` that many neighbours share a scale: along the axes of the weight that are
    summed over, flattened, so that the last group of a channel holds what is left and no size has
    to divide.  Four bits want groups: 128 or fewer.  Scales of groups are bfloat16, which makes 4.5
    bits of four with groups of 32, and their integers are those next to what the scales are then.

    Given data, weights are not rounded to the nearest integer, but so that the errors of one are
    made up for by others on what the float model gives each site (GPTQ; Frantar et al., 2022).
    Convolutions are too, on the patches under their windows.  A bias that is added to their outputs
    alone, or the mean that a BatchNorm takes from them, takes the mean of their error away: it
    differs from the given one by that.  A weight for which that
    does not lessen the error on held-out samples stays rounded to nearest, as do embeddings, which
    sum nothing, what reads fewer than 32 positions, and what would take more than 4 GiB of
    covariances: 16 K² bytes for each weight that sums K products, and each layer of a scan over
    stacked weights; the report says so for each site.  128 samples or more do; the data are read
    once for every GiB.

    With `weight_bits=4` the smallest weights are kept in 8 bits, as many as hold a twentieth of the
    parameters together (depthwise convolutions, the positions of a transformer, not its words); the
    report's `rules` name them, and `rules` of your own override that.

    Args:
      params: pytree of float arrays, as for `jaxquant.quant_post`.
      apply_fn: a pure function `apply_fn(params, *inputs)` in inference mode.
      example: a data set, as for `jaxquant.quant_post`, of samples like those to come; or
        `jax.ShapeDtypeStruct`s, as for `jaxquant.quant_dynamic`, where there are no data.
      weight_bits: 8 or 4; two 4-bit integers are packed in a byte.
      group_size: how many weights share a scale; None for one scale per output channel (per row of
        an embedding).
      weight_dtype: "int"; or a table of 16 values for four bits, which of exported files
        StableHLO alone has: "nf4", the quantiles of a normal distribution times the largest |w| of
        a group (QLoRA; it wants `group_size=64`), or "mxfp4", the floats E2M1 times a power of two
        for 32 neighbours (OCP Microscaling), whose scales take a byte each.
      recover: how data repair the weights, () for not at all, of the first batch alone:
        "gptq" as described above, the default where data are given; "awq" (of integers) before it
        gives channels of large inputs, outside of loops, a finer grid (Lin et al., 2023): they are
        divided in the normalisation or linear layer before the site, where nothing else reads that,
        and the weights multiplied, so that it costs nothing in the call.
      quantizable_op_type: the kinds whose weights become integers: "conv2d", "depthwise_conv2d",
        "mul" (a dot with a weight), "lookup_table" (an embedding: rows of a matrix by index), and
        if asked for "conv2d_transpose".
      batch_size, batch_nums: how `example` is read, as for `jaxquant.quant_post`.
      skip, skip_first_last: what stays float, as for `jaxquant.quant_post`.
      rules: settings for some of the sites, each a `jaxquant.Rule`: here `dtype`, `weight_bits` and
        `recover`.
      select: what of an item of `example` is given to `apply_fn`.
      mask: which positions of padded texts count, as for `jaxquant.quant_post`.
      allow_batch_dependence: as for `jaxquant.quant_post`.
      progress: show what is being done, as `jaxquant.quant_post`.

    Returns:
      `(qparams, qapply)`, as `jaxquant.quant_post`; in `qparams["params"]` a weight is
      {"int8": ..., "scale": ...} or {"int4": ..., "scale": ...}.

    Raises:
      ValueError: an argument is not valid, `example` is empty or does not fit `apply_fn`, a weight
        or what a site reads is not finite, a skip pattern matches nothing, or nothing is there to
        quantize.
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
    # Looked at first, since what is wrong then is said before anything is read.
    has_data = not _has_shapes(example)
    if recover and not has_data:
        raise ValueError(
            f"recover={tuple(recover)!r} rounds weights on data, and example is shapes alone: pass "
            "samples, or leave recover out"
        )
    # With samples the rounding is theirs; shapes alone leave rounding to nearest.
    default = ("gptq",) if has_data else ()
    config = QuantConfig(
        algo="abs_max",
        quantizable_op_type=quantizable_op_type,
        recover=default if recover is None else recover,
        skip=skip,
        skip_first_last=skip_first_last,
        rules=rules,
        mode=WEIGHT_ONLY,
        weight_bits=weight_bits,
        group_size=group_size,
        weight_dtype=weight_dtype,
    )
    with Progress("quant_weights", progress) as shown:
        given = _inputs(example, select, batch_size, batch_nums)
        return _quantize(
            params, apply_fn, given, config, allow_batch_dependence, shown, Padding.of(mask)
        )


class _Given(NamedTuple):
    """What a model is traced and calibrated with.

    Attributes:
      inputs: the arguments after `params`, arrays or shapes.
      data: all batches, of which `inputs` is the first; None of shapes.
    """

    inputs: tuple[Any, ...]
    data: Data | None


def _inputs(
    example: Any, select: Any, batch_size: int | None = None, batch_nums: int | None = None
) -> _Given:
    """The arguments after `params`: of shapes as they are, of a data set its batches."""
    if not _has_shapes(example):
        read = functools.partial(
            iterate, example, batch_size=batch_size, batch_nums=batch_nums, select=select
        )
        total = num_batches(example, batch_size, batch_nums, select=select)
        # A callable, or a container, is read again from its start.
        if not isinstance(example, Iterator):
            return _Given(next(read()), Data(read, total))
        # An iterator is read once: its first batch goes back in front of the others.
        batches = read()
        first = next(batches)
        return _Given(first, Data(_Once(itertools.chain([first], batches)), total))
    if select is not None:
        raise ValueError(
            "select picks from items of a data set; leave it out where you pass shapes"
        )
    return _Given(tuple(example) if isinstance(example, (tuple, list)) else (example,), None)


class _Once:
    """Reads what can be read once alone, a generator."""

    def __init__(self, batches: Iterator[tuple[Any, ...]]):
        self._batches: Iterator[tuple[Any, ...]] | None = batches

    def __call__(self) -> Iterator[tuple[Any, ...]]:
        # The second call finds nothing, and says why.
        batches, self._batches = self._batches, None
        if batches is None:
            raise ValueError(
                "the covariances of this model are summed in several passes over the data, and "
                "example is a generator, which can be read once: pass a list, or a callable that "
                "returns a fresh generator"
            )
        return batches


def _has_shapes(tree: Any) -> bool:
    containers = (tuple, list, dict)  # a generator and other sources are not looked into
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: not isinstance(x, containers))
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _quantize(
    params: Any,
    apply_fn: Callable[..., Any],
    given: _Given,
    config: QuantConfig,
    allow_batch_dependence: bool,
    progress: Progress,
    padding: Padding | None = None,
) -> tuple[dict[str, Any], QuantizedApply]:
    inputs = given.inputs
    check_flag("allow_batch_dependence", allow_batch_dependence)
    check_model(params, apply_fn)
    source = FloatModel(apply_fn, params)
    with progress.stage("tracing"):
        model = trace_with_batch_sizes(source, inputs)
        check_no_randomness(model.graph)
        check_weights(model.graph, model.sites, params)
        config = config.with_rules(float_tables(model, params))
        # Before the user's rules, the last of which wins.
        if sensitive := eight_bit_rules(model, config):
            config = dataclasses.replace(config, rules=(*sensitive, *config.rules))
        if not allow_batch_dependence:
            check_independence(source, inputs, fast_convolutions)
        # Layers that rules treat differently get scans of their own before anything is planned.
        if (cut := cut_scans(source, model, config, inputs)) is not None:
            source, model, config = cut.source, cut.model, cut.resolved(config)
        binding = make_plan(model, None, config)
    recovered = quantize_and_recover(
        source,
        binding,
        [inputs],
        data=given.data,
        padding=padding,
        progress=progress,
    )
    program, qparams = recovered.program, recovered.qparams
    with progress.stage("comparing"):
        quality = UNKNOWN  # of an example that is shapes alone
        if given.data is not None:
            quality = measure_quality(recovered.comparison, qparams, inputs)
        report = make_report(
            program, source.params, qparams, quality, recovered.notes, recovered.by_site
        )
    plan = binding.whole_plan
    warn_if_poor(source, plan, report, inputs)
    warn_if_larger(params, qparams)
    qapply = QuantizedApply(Code(apply_fn, params, source.cuts), plan, report, inputs)
    if sensitive:
        qapply = qapply.with_summary({"rules": [rule_data(rule) for rule in sensitive]})
    return qparams, qapply
