"""What makes the output of an int8 site of its accumulator."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.primitives import Channels
from jaxquant.jax_shim import jaxprs


def epilogue(
    movements: Sequence[ir.Equation],
    channels: Channels,
    value: jax.Array,
    arrays: Mapping[str, jax.Array],
    scales: Sequence[jax.Array] = (),
) -> jax.Array:
    """The output of a site from its accumulator as float32.

    Args:
      movements: the equations that rearrange the accumulator first.
      channels: where the output channels are behind them.
      value: its accumulator.
      arrays: its multiplier and bias.
      scales: of operands that are scaled in the call; they broadcast to `value`.
    """
    # Scales come together first: where the output is a float, what one step of it is worth is one,
    # while the sum times one of them alone may be beyond (a row of 1e36 on weights of 1e-30).
    worth = functools.reduce(jnp.multiply, scales) if scales else None
    # Movements take whole arrays: a scale of size 1 lacks the axes that they move.
    if worth is not None and movements:
        worth = jnp.broadcast_to(worth, value.shape)
    for eqn in movements:
        (value,) = jaxprs.bind(eqn.primitive, [value], dict(eqn.params))
        if worth is not None:
            (worth,) = jaxprs.bind(eqn.primitive, [worth], dict(eqn.params))

    # Multiplier and bias go by channel, which the movements may have put elsewhere.
    multiplier = channels.spread(arrays["multiplier"], value.ndim)
    value = value * (multiplier if worth is None else worth * multiplier)
    if "bias" in arrays:
        value = value + channels.spread(arrays["bias"], value.ndim)
    return value
