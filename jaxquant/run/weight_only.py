"""Sites whose weights alone are integers: dequantize in the call, then compute in float."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant.backends import ragged
from jaxquant.backends.matrices import Matrices
from jaxquant.graph import evaluate, ir
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.layout import WeightView
from jaxquant.run.dequantize import StoredWeight, dequantize_weight
from jaxquant.run.siblings import StoredDot


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
    # Where rows choose among several matrices, one at a time; else the whole weight in floats.
    is_chosen = site.contraction is not None and site.contraction.choosing is not None
    if is_chosen and not view.movements and not site.as_contraction.has_batch:
        value = _by_chosen(eqn, site, operands[0], stored, operands[1])
        return value.astype(env.graph.dtype(eqn.outputs[0]))
    weight = dequantize_weight(stored).astype(dtype)
    # A weight that copies share is stored once, and spread where it is used.
    weight = jnp.broadcast_to(weight, env.graph.shape(view.var))
    for movement in view.movements:
        (weight,) = jaxprs.bind(movement.primitive, [weight], dict(movement.params))
    operands.insert(site.weight_position, weight)
    (value,) = jaxprs.bind(eqn.primitive, operands, dict(eqn.params))
    return value


def matrices(dot: StoredDot, stored: StoredWeight) -> list[jax.Array]:
    """The integers and the scales of a dot's weight, as a product takes them."""
    matrix, length = dot.matrix, dot.product.length
    # In bytes along K, of which one holds two codes of four bits.
    integers = matrix.matrix(stored.integers, -(-length * stored.weight_bits // 8))
    return [integers, matrix.matrix(stored.scale, stored.layout.groups)]


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

    # Rows of one expert at a time, so that one expert's weight is dequantized at a time.
    def product(block: jax.Array, index: jax.Array) -> jax.Array:
        # Eight bits lie in the weight's own order, four in that of their groups.
        axis = chosen if stored.weight_bits == 8 else place
        integers = jax.lax.dynamic_index_in_dim(stored.integers, index, axis)
        scale = jax.lax.dynamic_index_in_dim(stored.scale, index, place)
        weight = dequantize_weight(stored._replace(integers=integers, scale=scale, layout=one))
        matrix = weight.transpose((chosen, *own.contracted, *own.free))
        matrix = matrix.reshape(layout.summed, layout.columns).astype(block.dtype)
        precision = eqn.params.get("precision")
        return jax.lax.dot(block, matrix, precision=precision, preferred_element_type=jnp.float32)

    rows, ends = layout.x(x), layout.ends(sizes)
    return layout.back(ragged.by_blocks(layout, rows, ends, product, 0, jnp.float32))
