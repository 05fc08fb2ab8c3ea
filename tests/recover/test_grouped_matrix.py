"""A stored weight as the matrix of a product, whatever its axes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import trace_model
from jaxquant.plan import layout
from jaxquant.plan.groups import group_layout
from jaxquant.recover.grouped_matrix import grouped_matrix
from jaxquant.recover.product import SiteProduct
from jaxquant.weights.groups import quantize_groups


def conv(groups: int = 1, names: Any = ("NHWC", "HWIO", "NHWC")) -> Any:
    def apply_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=names, feature_group_count=groups
        )

    return apply_fn


CASES = {
    "dense": (lambda w, x: x @ w, (2, 9), (9, 4)),
    "transposed": (lambda w, x: x @ w.T, (2, 9), (4, 9)),
    "heads": (lambda w, x: jnp.einsum("nd,dhk->nhk", x, w), (2, 6), (6, 2, 3)),
    "two contracted": (lambda w, x: jnp.einsum("nhk,hkd->nd", x, w), (2, 2, 3), (2, 3, 5)),
    "crossed": (lambda w, x: jnp.einsum("nkh,hdk->nd", x, w), (2, 3, 2), (2, 5, 3)),
    "conv": (conv(), (1, 4, 4, 3), (3, 2, 3, 4)),
    "channels first": (conv(names=("NCHW", "OIHW", "NCHW")), (1, 3, 4, 4), (4, 3, 3, 2)),
    "grouped": (conv(2), (1, 4, 4, 6), (2, 2, 3, 4)),
    "depthwise": (conv(3), (1, 4, 4, 3), (3, 3, 1, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_is_what_the_product_multiplies(case, group_size, bits):
    apply_fn, x_shape, w_shape = case
    weight = np.random.default_rng(0).normal(size=w_shape).astype(np.float32)
    model = trace_model(apply_fn, weight, (np.zeros(x_shape, np.float32),))
    (site,) = model.sites
    product = SiteProduct(model.graph, site)
    view = layout.weight_view(model.graph, site, integer=False)
    groups = group_layout(view.shape, view.channels, group_size)
    found = grouped_matrix(product, view, groups)
    assert found is not None

    # Its rows are those of the product in another order, in which groups are neighbours.
    taken = weight
    for movement in view.movements:
        taken = taken.transpose(movement.params["permutation"])
    own = product.matrix(taken)
    np.testing.assert_array_equal(found.matrix(weight)[:, found.order], own)
    covariance = np.einsum("gkn,gln->gkl", own, own)
    moved = found.matrix(weight)
    np.testing.assert_allclose(
        found.covariance(covariance), np.einsum("gkn,gln->gkl", moved, moved), rtol=1e-4, atol=1e-5
    )

    # Integers times steps are the weight, as far as it can be stored, and go back to their places.
    integers, scale = quantize_groups(weight, groups, bits)
    step = found.step(scale)
    assert step.shape == moved.shape
    there = found.integers(integers, bits)
    assert np.abs(there * step - moved).max() <= (0.5 if bits == 8 else 3.6) * step.max()
    assert np.mean(np.abs(there * step - moved) <= 0.51 * step) > (0.99 if bits == 8 else 0.8)
    np.testing.assert_array_equal(found.stored(there, bits), integers)


def test_what_stands_in_several_places_has_none():
    weight = np.ones((3, 4), np.float32)

    def apply_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        spread = jnp.broadcast_to(w[:, None], (3, 2, 4)).reshape(6, 4)
        return x @ spread

    def in_place(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("nhk,hkd->nd", x, jnp.broadcast_to(w[None], (2, 3, 4)))

    for function, shape in ((apply_fn, (2, 6)), (in_place, (2, 2, 3))):
        model = trace_model(function, weight, (np.zeros(shape, np.float32),))
        (site,) = model.sites
        view = layout.weight_view(model.graph, site, integer=False)
        groups = group_layout(view.shape, view.channels, None)
        is_spread = view.shape != model.graph.shape(site.weight)
        found = grouped_matrix(SiteProduct(model.graph, site), view, groups)
        assert (found is None) == is_spread
