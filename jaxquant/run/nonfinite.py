"""NaN and infinity go past the int8 network, which cannot hold them, to its outputs.

What is quantized from a float that could hold one leaves a mark: zero times its sum, which is NaN
where there is one and costs a part of quantizing it.  There are few such floats: the model's inputs
and what comes of them in float, and what a logarithm, a quotient or the like gives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir, primitives
from jaxquant.graph.rows import Rows, axis_of, is_whole, sizes_around
from jaxquant.jax_shim import jaxprs

# Of finite operands these may give others.
_MAKE_THEM = """
    acos acosh asin atanh cosh cumprod div exp exp2 expm1 log log1p log2 pow reduce_prod rem rsqrt
    sinh sqrt tan
"""
_MAKES_THEM = frozenset(_MAKE_THEM.split())
_MANY = 2**16  # values of which the plain sum is worth a second branch to compile


def makes_them(graph: ir.Graph, eqn: ir.Equation) -> bool:
    """True where finite operands of an equation may give NaN or infinity."""
    if eqn.name == "convert_element_type" and may_hold_them(graph, eqn.outputs[0]):
        given = graph.dtype(eqn.inputs[0])
        is_narrowed = jnp.issubdtype(given, jnp.floating) and (
            jnp.finfo(graph.dtype(eqn.outputs[0])).max < jnp.finfo(given).max
        )
        return bool(is_narrowed)
    if eqn.name == "div" and (divisor := primitives.constant_scalar(graph, eqn.inputs[1])):
        return abs(divisor) < 1  # by the number of elements, as a mean does, none is made
    fills = eqn.name == "gather" and "FILL" in str(eqn.params.get("mode"))
    return eqn.name in _MAKES_THEM or fills or bool(jaxprs.sub_bodies(dict(eqn.params)))


def mark(value: jax.Array, is_stored: bool) -> jax.Array:
    """[N] for `value` [N, ..., C]: NaN where one of its entries is NaN or infinite, else 0.

    Args:
      value: floats.
      is_stored: the value is in memory, as a model's input is, and not computed on the way to its
        rounding, with which a sum is fused.
    """
    value = value.astype(jnp.float32)
    axes = tuple(range(1, value.ndim))

    def scaled(value: jax.Array) -> jax.Array:
        """The sum in units in which no finite entries overflow."""
        return (value * jnp.float32(2.0**-64)).sum(axis=axes)

    def on_cpu(value: jax.Array) -> jax.Array:
        """The plain sum, of which XLA knows a fast form there; the other where it is not finite."""
        total = value.sum(axis=axes)
        return lax.cond(jnp.isfinite(total).all(), lambda _: total, scaled, value)

    # Two forms of the sum are two to compile, which a small tensor does not give back.
    is_small = isinstance(value.size, int) and value.size < _MANY
    if not is_stored or is_small:
        return scaled(value) * jnp.float32(0)
    return lax.platform_dependent(value, cpu=on_cpu, default=scaled) * jnp.float32(0)


def entries_first(value: jax.Array, rows: Rows | None) -> jax.Array:
    """A tensor as `mark` takes it, to tell the entries apart along the axis of its rows."""
    if rows is None:
        return value.reshape(1, -1)
    return value[:, None] if value.ndim == 1 else jnp.moveaxis(value, axis_of(rows), 0)


def marked_rows(marks: jax.Array, rows: Rows | None) -> jax.Array:
    """Which rows are marked, bool [N], by the marks of the entries along their axis.

    bool [] where the whole tensor is one row.
    """
    bad = jnp.isnan(marks)
    if rows is None:
        return bad.any()
    return bad if is_whole(rows) else bad.reshape(sizes_around(rows)).any(axis=(0, 2))


def each_entry(marked: jax.Array, rows: Rows) -> jax.Array:
    """Which entries along the axis of some rows, [N], belong to those that are marked."""
    if is_whole(rows):
        return marked
    return jnp.broadcast_to(marked[None, :, None], sizes_around(rows)).reshape(-1)


def spread(marked: jax.Array, rows: Rows) -> jax.Array:
    """Which rows are marked, [N], in a shape that is broadcast to their tensor's."""
    return jnp.expand_dims(each_entry(marked, rows), range(1, len(rows) - axis_of(rows)))


def may_hold_them(graph: ir.Graph, var: ir.Var) -> bool:
    """Whether the dtype of a tensor has NaN."""
    return bool(jax.dtypes.issubdtype(graph.dtype(var), jnp.inexact))
