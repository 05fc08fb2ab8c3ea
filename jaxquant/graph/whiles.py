"""A `while` whose test multiplies: the test is computed at the end of each step instead.

The loop then carries whether it goes on, the first test stands before it, and what the test
multiplies is in the body, where it is quantized as everything else there.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxquant.graph import contraction
from jaxquant.jax_shim import jaxprs


def with_test_in_body(eqn: jaxprs.JaxprEqn) -> jaxprs.ClosedJaxpr | None:
    """What a `while` computes, with its test in its body.

    Args:
      eqn: the loop.

    Returns:
      A function of the same operands; None where the test multiplies nothing, or tests for a batch
      of loops, as `jax.vmap` makes it.
    """
    of_test, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    if test.out_avals[0].shape or not holds_product(test.jaxpr):
        return None
    goes_on, step = jaxprs.jaxpr_as_fun(test), jaxprs.jaxpr_as_fun(body)

    def run(*operands: Any) -> list[Any]:
        read_by_test, fixed = operands[:of_test], operands[of_test : of_test + of_body]

        def tested(carry: list[Any]) -> tuple[Any, list[Any]]:
            return goes_on(*read_by_test, *carry)[0], carry

        start = tested(list(operands[of_test + of_body :]))
        return jax.lax.while_loop(lambda c: c[0], lambda c: tested(step(*fixed, *c[1])), start)[1]

    shapes = [jax.ShapeDtypeStruct(jaxprs.shape_of(x), jaxprs.dtype_of(x)) for x in eqn.invars]
    return jax.make_jaxpr(run)(*shapes)


def holds_product(jaxpr: jaxprs.Jaxpr) -> bool:
    """Whether a convolution or dot is in a jaxpr, or in the bodies in it."""
    return any(
        eqn.primitive.name in contraction.PRIMITIVES
        or any(holds_product(inner) for _, inner, _ in jaxprs.sub_bodies(dict(eqn.params)))
        for eqn in jaxpr.eqns
    )
