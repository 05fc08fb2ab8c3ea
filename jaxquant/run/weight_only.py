"""Sites whose weights alone are integers: dequantize in the call, then compute in float."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxquant.backends import ragged
from jaxquant.backends.matrices import Matrices
from jaxquant.graph import evaluate, ir
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.layout import WeightView
from jaxquant.run import blocks
from jaxquant.run.dequantize import StoredWeight, dequantize_weight


def apply(
    env: evaluate.Environment,
    eqn: ir.Equation,
    site: Site,
    view: WeightView,
    stored: StoredWeight,
) -> jax.Array:
    """The site's equation on its dequantized weight, in the model's dtype.

    Args:
      env: holds what else the equation reads.
      eqn, site: the site.
      view: how the equation takes the stored weight.
      stored: the stored weight.
    """
    dtype = env.graph.dtype(view.var)
    operands = [env.read(x) for x in eqn.inputs if x != site.weight]
    is_chosen = site.contraction is not None and site.contraction.choosing is not None
    if is_chosen and not view.movements and not site.as_contraction.has_batch:
        value = _by_chosen(eqn, site, operands[0], stored, operands[1])
        return value.astype(env.graph.dtype(eqn.outputs[0]))
    if (order := _as_matrix(site, view, stored)) is not None:
        return _by_blocks(eqn, site, operands[0], stored, order).astype(
            env.graph.dtype(eqn.outputs[0])
        )
    weight = dequantize_weight(stored).astype(dtype)
    weight = jnp.broadcast_to(weight, env.graph.shape(view.var))
    for movement in view.movements:
        (weight,) = jaxprs.bind(movement.primitive, [weight], dict(movement.params))
    operands.insert(site.weight_position, weight)
    (value,) = jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
    return value


def _as_matrix(site: Site, view: WeightView, stored: StoredWeight) -> tuple[int, ...] | None:
    """Where the weight's axes are in what is stored, if that is a matrix; None otherwise.

    Its summed axes are the first or the last, and it has others than those.
    """
    layout, contraction = stored.layout, site.as_contraction
    if not contraction.is_dot or any(m.name != "transpose" for m in view.movements):
        return None
    if contraction.has_batch or layout.order != tuple(range(len(layout.order))):
        return None
    order = layout.order
    for movement in view.movements:
        order = tuple(order[a] for a in movement.params["permutation"])
    summed = len(site.weight_axes.contracted)
    is_first = layout.axis == 0
    is_last = layout.axis == len(layout.shape) - 1
    is_whole = summed in (0, len(order)) or not (is_first or is_last)
    return None if is_whole or 0 in layout.shape else order


def _by_blocks(
    eqn: ir.Equation, site: Site, x: jax.Array, stored: StoredWeight, order: Sequence[int]
) -> jax.Array:
    """A dot with a stored matrix, as float32.

    Args:
      eqn, site: the dot; it has no batch axes.
      x: its other operand.
      stored: the weight.
      order: the stored axis that each axis of the weight is.
    """
    free, channels = site.input_axes.free, site.weight_axes.free
    layout = stored.layout

    # x as a matrix [rows, K], K in the order in which the weight is stored.
    summed = (order[axis] for axis in site.weight_axes.contracted)
    pairs = sorted(zip(summed, site.input_axes.contracted, strict=True))
    rows = x.transpose([*free, *(axis for _, axis in pairs)])
    rows = rows.reshape(math.prod(x.shape[axis] for axis in free), layout.shape[layout.axis])

    # The weight as a matrix [K, N] or [N, K]: the axes of channels are neighbours too.
    length = layout.shape[layout.axis]
    others = math.prod(layout.permuted[order[axis]] for axis in channels)
    shape = (length, others) if layout.axis == 0 else (others, length)
    along = int(layout.axis != 0)
    scale_shape = tuple(layout.groups if axis == along else others for axis in (0, 1))
    packed = -(-length // 2) if stored.weight_bits == 4 else length
    stored_shape = tuple(packed if axis == along else others for axis in (0, 1))
    matrix = stored._replace(
        integers=stored.integers.reshape(stored_shape),
        scale=stored.scale.reshape(scale_shape),
        layout=layout.as_matrix(shape),
    )
    value = blocks.dot(rows, matrix, eqn.params["precision"])

    # The result's axes are the left operand's first; channels come as they are stored.
    ascending = sorted(channels, key=lambda axis: order[axis])
    value = value.reshape(
        [*(x.shape[axis] for axis in free), *(layout.permuted[order[axis]] for axis in ascending)]
    )
    places = [len(free) + ascending.index(axis) for axis in channels]
    rest = list(range(len(free)))
    return value.transpose([*rest, *places] if site.weight_position else [*places, *rest])


def _by_chosen(
    eqn: ir.Equation, site: Site, x: jax.Array, stored: StoredWeight, sizes: jax.Array
) -> jax.Array:
    """A ragged dot without batch axes, as float32; of what rows choose from one is dequantized.

    Args:
      eqn, site: the ragged dot.
      x: its first operand.
      stored: the weight.
      sizes: of the groups.
    """
    groups, own = stored.layout, site.weight_axes
    (chosen,) = own.chosen
    place, one = groups.place(chosen), groups.of_one(chosen)
    shape = tuple(groups.permuted[at] for at in groups.inverse)
    layout = Matrices(site.as_contraction, 1, x.shape, shape)

    def product(block: jax.Array, index: jax.Array) -> jax.Array:
        axis = chosen if stored.weight_bits == 8 else place
        integers = jax.lax.dynamic_index_in_dim(stored.integers, index, axis)
        scale = jax.lax.dynamic_index_in_dim(stored.scale, index, place)
        weight = dequantize_weight(StoredWeight(integers, scale, one, stored.weight_bits))
        matrix = weight.transpose((chosen, *own.contracted, *own.free))
        matrix = matrix.reshape(layout.summed, layout.columns).astype(block.dtype)
        precision = eqn.params["precision"]
        return jax.lax.dot(block, matrix, precision=precision, preferred_element_type=jnp.float32)

    rows, ends = layout.x(x), layout.ends(sizes)
    return layout.back(ragged.by_blocks(layout, rows, ends, product, 0, jnp.float32))
