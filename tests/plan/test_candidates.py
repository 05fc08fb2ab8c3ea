"""Why contractions that have no int8 form stay float."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxquant.graph.model import trace_model
from jaxquant.plan.candidates import reason_for_float
from jaxquant.plan.config import QuantConfig
from tests import networks


def conv(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **options)


@pytest.mark.parametrize(
    ("apply_fn", "weight", "x", "reason"),
    [
        (lambda w, x: conv(x, w), (6, 3, 3, 3), (4, 3, 5, 5), ""),
        (lambda w, x: conv(x, w, batch_group_count=2), (6, 3, 3, 3), (4, 3, 5, 5),
         "batch_group_count is not 1"),
        (lambda w, x: conv(w, x), (4, 3, 5, 5), (6, 3, 3, 3), "its kernel depends on the inputs"),
        (lambda w, x: lax.ragged_dot(x, w, jnp.array([1, 4])), (2, 6, 7), (5, 6), ""),
        (lambda w, x: lax.ragged_dot(x @ w, jnp.ones((2, 7, 3)), jnp.array([1, 4])), (6, 7), (5, 6),
         "the weights that its rows choose from are no parameters"),
        (lambda w, x: x @ w, (140_000, 1), (1, 140_000), "its sums of 140000 products may overflow"
         " int32"),
        (lambda w, x: (x * w) @ (x + w).T, (140_000,), (1, 140_000),
         "its sums of 140000 products may overflow int32"),
    ],
)  # fmt: skip
def test_what_has_no_int8_form_says_why(
    apply_fn: Any, weight: tuple[int, ...], x: tuple[int, ...], reason: str
) -> None:
    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (weight, x))
    params, example = shapes
    *_, site = networks.find(apply_fn, params, example)
    model = trace_model(apply_fn, params, (example,))
    assert reason_for_float(model, site, QuantConfig(is_full_quantize=True)) == reason
