"""On a TPU a large residual is there before what adds it; its values are as they were."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends import residuals
from jaxquant.jax_shim import choices

TPU = choices.Place("tpu", is_export=False, is_one_device=True)
LARGE, SMALL = (2**23,), (2**10,)


@pytest.mark.parametrize(
    ("place", "shape", "is_barred"),
    [(TPU, LARGE, True), (TPU, SMALL, False), (choices.ONE_CPU, LARGE, False)],
)
def test_where_it_is_given_before(place: choices.Place, shape: tuple[int, ...], is_barred: bool):
    with choices.at(place):
        text = str(jax.make_jaxpr(lambda x: residuals.given_before(x))(jnp.zeros(shape)))
    assert ("optimization_barrier" in text) == is_barred


def test_its_values_stay():
    value = jnp.arange(2.0**23)
    with choices.at(TPU):
        np.testing.assert_array_equal(residuals.given_before(value), value)
