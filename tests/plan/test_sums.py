"""Where sums are quantized, however many steps of a loop lie between."""

import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.plan.sums import ScaledGraph, find_sums
from tests.plan.full import binding_of

PARAMS = {"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}


@pytest.mark.parametrize("places", [1, 4])
def test_values_that_wait_in_a_loop_for_some_steps(places):
    """What a step computes is quantized so many steps later, as in a delay line."""

    def apply_fn(p, x):
        def step(carry):
            number, *waiting = carry
            return number + 1, x @ p["a"], *waiting[:-1], jnp.tanh(waiting[-1] @ p["b"])

        def goes_on(carry):
            return carry[0] < 5

        start = (jnp.int32(0), *[x] * (places + 1))
        return lax.while_loop(goes_on, lambda c: step(c[:-1]), (*start, x))[-1]

    binding = binding_of(apply_fn, PARAMS, jnp.ones((2, 4)), is_full_quantize=False)
    found = find_sums(ScaledGraph.of(binding))
    (body,) = [body for bodies in binding.bodies.values() for body in bodies]
    ends = {site.site.name: site.epilogue.output for site in body.layers[0].sites}
    (sums,) = [sums for scaled, sums in found.items() if scaled.graph is body.model.graph]
    assert ends["a"] in sums
    assert sums[ends["a"]].alone
