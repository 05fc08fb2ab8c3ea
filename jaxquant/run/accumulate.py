"""Lowerings of sites whose sums are not of a tensor with a stored weight and planned scales.

A product of two tensors, a sum over one, a weight that the program computes, operands that are
scaled in each call: the accumulator in int32, the epilogue in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.backends import int8, platforms, ragged
from jaxquant.backends.backend import Call
from jaxquant.backends.epilogue import epilogue
from jaxquant.backends.platforms import Table
from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph import evaluate, ir
from jaxquant.graph.sites import Site
from jaxquant.jax_shim.extremes import largest
from jaxquant.plan.binding import Int8Site
from jaxquant.plan.epilogue import output_channels
from jaxquant.plan.grid import SMALLEST_SCALE
from jaxquant.run import dynamic, weight_only
from jaxquant.run.lowerings import Evaluation, Lowering
from jaxquant.run.siblings import StoredDot, multiply, product_of
from jaxquant.run.weights import StoredWeights


def of_tensors(graph: ir.Graph, int8_site: Int8Site) -> Lowering:
    """A site without a stored weight, with planned scales."""

    def lowering(state: Evaluation) -> evaluate.Values:
        site, quantized = int8_site.site, state.quantized
        # Every operand is a tensor with a planned scale, which the multiplier holds already.
        operands = [quantized.int8(v) for v in site.operands]
        zero_points = [quantized.zero_point(v) for v in site.operands]
        value = _sum(graph, site, operands, zero_points, state.env)
        return _finished(int8_site, value, state)

    return lowering


def scaled_in_the_call(
    graph: ir.Graph,
    int8_site: Int8Site,
    weights: StoredWeights,
    table: Table,
    siblings: Sequence[StoredDot],
) -> Lowering:
    """A site whose operands have scales of their own in each call; with or without a weight.

    Args:
      graph, int8_site: the site.
      weights: where its weight is.
      table: the backends that may run it.
      siblings: the dots that run as one product with it, itself among them; none if it is no dot
        with a stored matrix.
    """
    site = int8_site.site
    eqn = graph.equations[site.equation]
    convolution = _convolution(graph, site)

    def lowering(state: Evaluation) -> evaluate.Values:
        # The kernel finds a row's grid and rounds the row in one pass, to the same bits.
        natively = bool(platforms.kernels(table))
        scaled = dynamic.quantize_operands(state.env, eqn, int8_site, natively)
        operands, scales = [each.int8 for each in scaled], [each.scale for each in scaled]
        zero_points = [0] * len(operands)
        if site.stored_weight is None:
            # A product of two tensors has nothing stored, and no sums that are known beforehand.
            value = _sum(graph, site, operands, zero_points, state.env)
        else:
            stored = weights.integers(site, state.qparams)
            # A dot goes by its siblings' product; what no kernel covers falls through to XLA's sums
            # below.
            total = _by_kernel(site, operands[0], siblings, weights, state, table)
            if convolution is not None:
                given = {"x": operands[0], "weight": stored}
                if packed := _packed(state, [site.name]):
                    given["packed"] = packed[0]
                (total,) = platforms.run(table, convolution, given)
            # Kernels and XLA both give int32 sums; what follows is the same for either.
            operands.insert(site.weight_position, stored)
            if site.as_contraction.choosing is not None:
                operands.append(state.env.read(eqn.inputs[2]))
                relative = state.qparams["sites"][site.name]["relative_scale"]
                scales.append(ragged.of_rows(site.as_contraction, relative, *operands))
            if total is None:
                total = int8.accumulate(site.as_contraction, operands, zero_points)
            if (zero_point := scaled[0].zero_point) is not None:
                # Σ (q - z) w = Σ q w - z Σ w: the second sum is known, one number a channel.
                sums = state.qparams["sites"][site.name]["weight_sum"]
                total = total - zero_point * output_channels(graph, site).spread(sums, total.ndim)
            value = total.astype(jnp.float32)
        return _finished(int8_site, value, state, scales)

    return lowering


def _by_kernel(
    site: Site,
    x: jax.Array,
    siblings: Sequence[StoredDot],
    weights: StoredWeights,
    state: Evaluation,
    table: Table,
) -> jax.Array | None:
    """The int32 sums of a dot of int8 rows with a stored weight; None where there is no kernel."""
    # An earlier sibling left this one's sums.  Popped, so that no array outlives its one reader.
    if site.name in state.sums or not siblings:
        return state.sums.pop(site.name, None)
    packed = _packed(state, [dot.name for dot in siblings])
    product = product_of(siblings, siblings[0].matrix.rows(x))
    if not platforms.covers_product(table, product, bool(packed)):
        return None
    arrays = [
        dot.matrix.matrix(weights.integers(dot.bound.site, state.qparams), product.length)
        for dot in siblings
    ]
    state.sums.update(multiply(table, siblings, x, arrays, packed))
    return state.sums.pop(site.name)


def _packed(state: Evaluation, names: Sequence[str]) -> list[jax.Array]:
    """The packed weights of some sites; none where one of them lacks."""
    packed = state.qparams.get("packed", {})
    return [packed[name] for name in names] if all(name in packed for name in names) else []


def _convolution(graph: ir.Graph, site: Site) -> Call | None:
    """The int32 sums of a convolution with a stored weight; None of other sites."""
    if site.stored_weight is None or site.as_contraction.window is None:
        return None
    assert site.weight is not None
    assert site.output is not None
    # Sums alone: a kernel has one multiplier a channel, and here each sample has its own scale.
    return Call(
        contraction=site.as_contraction,
        weight_position=site.weight_position,
        weight_shape=graph.shape(site.weight),
        movements=(),
        channels=output_channels(graph, site),
        shape=graph.shape(site.output),
        zero_point=0,
        gives_float=False,
        gives_sums=True,
    )


def packed(
    graph: ir.Graph, site: Site, dot: StoredDot | None, weight: jax.Array, table: Table
) -> jax.Array | None:
    """The weight of a site that is scaled in the call as kernels read it; None where none does."""
    if (convolution := _convolution(graph, site)) is not None:
        # The table is in order of preference: the first that covers it is the one that will run.
        found = (kernel for kernel in platforms.kernels(table) if kernel.covers(convolution))
        kernel = next(found, None)
        return None if kernel is None else kernel.pack(convolution, weight)
    if dot is None:
        return None
    return platforms.pack_product(table, dot.product, dot.matrix.matrix(weight, dot.matrix.length))


def on_dequantized_weight(
    graph: ir.Graph,
    int8_site: Int8Site,
    weights: StoredWeights,
    table: Table,
    siblings: Sequence[StoredDot],
) -> Lowering:
    """A site that computes in the model's dtype on a weight stored as integers.

    Args:
      graph, int8_site: the site.
      weights: where its weight is.
      table: the backends that may run it.
      siblings: as of `scaled_in_the_call`.
    """
    site = int8_site.site
    eqn, view = graph.equations[site.equation], weights.view(site)
    dtype = graph.dtype(eqn.outputs[0])

    def whole(state: Evaluation) -> evaluate.Values:
        stored = weights.in_groups(site, state.qparams)
        value = weight_only.apply(state.env, eqn, site, view, stored)
        return {int8_site.epilogue.output: value}

    def by_matrix(state: Evaluation) -> evaluate.Values:
        # The first of the siblings that is reached multiplies for all of them.
        if site.name not in state.sums:
            arrays = [
                array
                for dot in siblings
                for array in weight_only.matrices(
                    dot, weights.in_groups(dot.bound.site, state.qparams)
                )
            ]
            x = state.env.read(eqn.inputs[1 - site.weight_position])
            state.sums.update(multiply(table, siblings, x, arrays))
        # Products of floats come as float32; the readers have the dtype of the equation.
        return {int8_site.epilogue.output: state.sums.pop(site.name).astype(dtype)}

    return by_matrix if siblings else whole


def _finished(
    int8_site: Int8Site, value: jax.Array, state: Evaluation, scales: Sequence[jax.Array] = ()
) -> evaluate.Values:
    arrays = state.qparams["sites"][int8_site.site.name]
    movements, channels = int8_site.epilogue.movements, int8_site.epilogue.channels
    return {int8_site.epilogue.output: epilogue(movements, channels, value, arrays, scales)}


def _sum(
    graph: ir.Graph,
    site: Site,
    operands: Sequence[jax.Array],
    zero_points: Sequence[ZeroPoint],
    env: evaluate.Environment,
) -> jax.Array:
    """The accumulator of a site without a stored weight, as float32."""
    eqn = graph.equations[site.equation]
    if site.weight is not None:
        return _with_computed_weight(graph, site, operands[0], zero_points[0], env)
    # An operand that the equation reads twice has one entry among the site's.
    if len(operands) == 1 and len(eqn.inputs) == 2:  # a tensor with itself
        operands, zero_points = [*operands] * 2, [*zero_points] * 2
    return int8.combine(eqn, site.contraction, operands, zero_points).astype(jnp.float32)


def _with_computed_weight(
    graph: ir.Graph, site: Site, x: jax.Array, zero_point: ZeroPoint, env: evaluate.Environment
) -> jax.Array:
    """The sum with a weight that the program computes and quantizes, as float32."""
    assert site.weight is not None
    axes = site.channel_axes
    weight, scale = _quantize_weight(env.wide(site.weight), axes)
    operands = [x, weight] if site.weight_position else [weight, x]
    total = int8.accumulate(site.as_contraction, operands, [zero_point])
    channels = output_channels(graph, site)
    # A computed weight has no sum that is known beforehand.
    if not is_zero(zero_point):
        offset = zero_point * _weight_sums(weight, axes)
        total = total - channels.spread(offset, total.ndim)
    return total.astype(jnp.float32) * channels.spread(scale, total.ndim)


def _quantize_weight(weight: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """A weight that is computed in the program: int8, and its scale [C] along `axes`."""
    # In bfloat16 the scale itself would be rounded.
    weight = weight.astype(jnp.float32)
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    threshold = largest(jnp.abs(weight), axis=summed, keepdims=True, initial=0)
    smallest = jnp.float32(SMALLEST_SCALE)  # of which the inverse is a float

    # A channel of zeros gets the scale 1: any scale gives its zeros, and 1 divides by nothing.
    scale = jnp.where(threshold == 0, 1, jnp.maximum(threshold / jnp.float32(127), smallest))
    return int8.quantize(weight, jnp.float32(1) / scale), scale.reshape(-1)


def _weight_sums(weight: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The sums of an int8 weight over all but `axes`: int32 [C]."""
    summed = tuple(a for a in range(weight.ndim) if a not in axes)
    return jnp.sum(weight, axis=summed, dtype=jnp.int32).reshape(-1)
