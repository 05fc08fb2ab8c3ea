"""A `while` whose test multiplies, or tests for a batch of loops: tested at the end of each step.

The loop then carries whether it goes on, the first test stands before it, and what the test
multiplies is in the body, where it is quantized as everything else there.  A batch of loops, as
`jax.vmap` makes it of a `while`, has a lane for each: the loop goes on while any lane does, and a
lane that is done stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxquant.graph import contraction
from jaxquant.jax_shim import jaxprs


def with_test_in_body(eqn: jaxprs.JaxprEqn) -> jaxprs.ClosedJaxpr | None:
    """What a `while` computes, with its test in its body.

    Args:
      eqn: the loop.

    Returns:
      A function of the same operands; None where the test is one for all and multiplies nothing.
    """
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    # Most loops test a number: those stay as they are.
    if not (has_lanes(test) or holds_product(test.jaxpr)):
        return None
    goes_on, step = jaxprs.jaxpr_as_fun(test), jaxprs.jaxpr_as_fun(body)

    def run(*operands: Any) -> list[Any]:
        read_by_test, fixed = operands[:of_test], operands[of_test : of_test + of_body]
        return tested_in_body(
            lambda carry: goes_on(*read_by_test, *carry)[0],
            lambda carry: step(*fixed, *carry),
            list(operands[of_test + of_body :]),
        )

    # By shapes: a function of the same operands.
    shapes = [jax.ShapeDtypeStruct(jaxprs.shape_of(x), jaxprs.dtype_of(x)) for x in eqn.invars]
    return jax.make_jaxpr(run)(*shapes)


def has_lanes(test: jaxprs.ClosedJaxpr) -> bool:
    """Whether the test of a `while` is that of a batch of loops."""
    return bool(test.out_avals[0].shape)


def tested_in_body(
    test: Callable[[list[Any]], jax.Array],
    step: Callable[[list[Any]], list[Any]],
    start: list[Any],
) -> list[Any]:
    """The carry behind a loop.

    Args:
      test: of the carry: bool [], or of the shape of the lanes, the first axes of all that is
        carried.
      step: gives the carry behind a step.
      start: the carry before the first one.
    """

    def body(both: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
        lanes, carry = both
        found = step(carry)
        if lanes.ndim:
            # A lane that is done keeps what it has, as `jax.vmap` of a loop means it.
            found = [_chosen(lanes, *each) for each in zip(found, carry, strict=True)]
        return test(found), found

    def goes_on(both: tuple[jax.Array, list[Any]]) -> jax.Array:
        return jnp.any(both[0]) if both[0].ndim else both[0]

    # The first test stands before the loop, which may run no step at all.
    return jax.lax.while_loop(goes_on, body, (test(start), start))[1]


def _chosen(lanes: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Each lane from one of two arrays."""
    # The lanes are the first axes, whatever is behind them.
    return jnp.where(jnp.expand_dims(lanes, range(lanes.ndim, new.ndim)), new, old)


def holds_product(jaxpr: jaxprs.Jaxpr) -> bool:
    """Whether a convolution or dot is in a jaxpr, or in the bodies in it."""
    return any(
        eqn.primitive.name in contraction.PRIMITIVES
        or any(holds_product(inner) for _, inner, _ in jaxprs.sub_bodies(dict(eqn.params)))
        for eqn in jaxpr.eqns
    )
