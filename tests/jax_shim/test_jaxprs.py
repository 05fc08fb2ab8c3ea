"""Equations as any release of JAX has them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.jax_shim import jaxprs


def test_a_scan_is_told_by_numbers_and_bound_as_this_jax_wants_it():
    def scan(a, c, xs):
        return jax.lax.scan(lambda carry, x: (carry * a + x, carry - x), c, xs, reverse=True)

    operands = jnp.full(2, 3.0), jnp.ones(2), jnp.arange(6.0).reshape(3, 2)
    (eqn,) = jax.make_jaxpr(scan)(*operands).jaxpr.eqns
    portable = jaxprs.portable_params("scan", eqn.params)
    assert (portable["num_consts"], portable["num_carry"]) == (1, 1)
    assert not {"ft_in", "ft_out"} & portable.keys()
    found = jaxprs.bind(eqn.primitive, operands, jaxprs.own_params("scan", portable))
    for got, wanted in zip(found, jax.tree.leaves(scan(*operands)), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_other_parameters_are_what_they_were():
    assert jaxprs.own_params("mul", jaxprs.portable_params("mul", {"a": 1})) == {"a": 1}
