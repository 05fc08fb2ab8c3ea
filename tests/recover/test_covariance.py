"""Sums of x xᵀ over batches, against NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import FloatModel
from jaxquant.plan.config import QuantConfig
from jaxquant.plan.make import make_plan
from jaxquant.recover.covariance import Found, sum_products

RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def sums(params: Any, apply_fn: Any, batches: Any) -> Found:
    source = FloatModel(apply_fn, params)
    config = QuantConfig(algo="abs_max", recover=(), mode="weight_only")
    plan = make_plan(source.trace((batches[0],)), None, config).whole_plan
    names = [site.name for site in plan.sites if not site.reason]
    return sum_products(source, plan, [(batch,) for batch in batches], names)


def check(
    found: Any, kept: np.ndarray, apart: np.ndarray, counted: np.ndarray | None = None
) -> None:
    """Against rows [R, G, K] of both parts; `counted` tells how far each counts, both together."""
    assert found.counts.tolist() == [len(kept), len(apart)]
    assert found.products.dtype == found.totals.dtype == np.float64
    rows, cut = np.concatenate([kept, apart]), len(kept)
    weights = np.ones(len(rows)) if counted is None else counted
    for part, own in enumerate((slice(None, cut), slice(cut, None))):
        x, w = rows[own], weights[own]
        products = np.einsum("r,rgk,rgl->gkl", w, x, x)
        np.testing.assert_allclose(found.products[part], products, rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose(
            found.totals[part], (w[:, None, None] * x).sum(axis=0), atol=1e-5
        )
        np.testing.assert_allclose(found.weights[part], w.sum(), rtol=1e-5)


def weights_of(y: np.ndarray) -> np.ndarray:
    """How far positions with outputs [R, C] count: none for more than four ordinary ones."""
    energy = (y.astype(np.float64) ** 2).sum(axis=1)
    return np.minimum(1, 4 * np.median(energy[energy > 0]) / np.maximum(energy, 1e-30))


def parts(batches: Any) -> tuple[np.ndarray, np.ndarray]:
    """The last quarter of each batch is held out."""
    cuts = [len(batch) - len(batch) // 4 for batch in batches]
    kept = [batch[:cut] for batch, cut in zip(batches, cuts, strict=True)]
    apart = [batch[cut:] for batch, cut in zip(batches, cuts, strict=True)]
    return np.concatenate(kept)[:, None], np.concatenate(apart)[:, None]


def test_batches_of_several_shapes_are_added():
    params = {"a": draw(5, 4), "b": draw(5, 3), "c": draw(4, 2)}

    def apply_fn(p: Any, x: jax.Array) -> Any:
        return jnp.tanh(x @ p["a"]) @ p["c"], x @ p["b"]

    batches = [draw(9, 5), draw(9, 5), draw(6, 5)]
    found = sums(params, apply_fn, batches)
    check(found["a"][()], *parts(batches))
    assert found["b"][()].products is found["a"][()].products or np.array_equal(
        found["b"][()].products, found["a"][()].products
    )
    check(found["c"][()], *parts([np.tanh(batch @ params["a"]) for batch in batches]))


def test_a_convolution_reads_patches():
    weight, x = draw(2, 2, 3, 4), draw(3, 5, 5, 3)

    def apply_fn(w: jax.Array, x: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=names)

    (found,) = sums({"w": weight}, lambda p, x: apply_fn(p["w"], x), [x])["w"].values()
    patches = np.lib.stride_tricks.sliding_window_view(x, (2, 2), axis=(1, 2))
    rows = patches.reshape(3 * 4 * 4, 1, 3 * 2 * 2)  # [R, G, I, H, W]
    check(found, rows[:36], rows[36:], weights_of(np.einsum("rgk,kn->rn", rows, kernel(weight))))


def kernel(weight: np.ndarray) -> np.ndarray:
    """[K, N] of one [H, W, I, O], K in the order of patches: I, H, W."""
    return weight.transpose(2, 0, 1, 3).reshape(-1, weight.shape[-1])


def test_layers_of_a_scan_are_apart_and_steps_of_a_loop_together():
    stacked, shared, x = draw(3, 4, 4) / 2, draw(4, 4) / 2, draw(8, 4)

    def layered(p: Any, x: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def repeated(p: Any, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["w"]), x)

    def while_loop(p: Any, x: jax.Array) -> jax.Array:
        def body(carry: Any) -> Any:
            return carry[0] + 1, jnp.tanh(carry[1] @ p["w"])

        return lax.while_loop(lambda carry: carry[0] < 3, body, (0, x))[1]

    def states(weights: Any) -> list[np.ndarray]:
        found = [x]
        for weight in weights[:-1]:
            found.append(np.tanh(found[-1] @ weight))
        return found

    found = sums({"w": stacked}, layered, [x])["w"]
    assert list(found) == [(0,), (1,), (2,)]
    for number, state in enumerate(states(stacked)):
        check(found[(number,)], *parts([state]), weights_of(state @ stacked[number]))
    steps = states([shared] * 3)
    weights = parts([weights_of(state @ shared) for state in steps])
    counted = np.concatenate([part[:, 0] for part in weights])
    for loop in (repeated, while_loop):
        check(sums({"w": shared}, loop, [x])["w"][()], *parts(steps), counted)


def test_of_single_rows_every_fourth_is_held_out():
    rows = draw(10, 5)
    found = sums({"w": draw(5, 2)}, lambda p, x: x @ p["w"], [row[None] for row in rows])["w"][()]
    is_apart = np.arange(10) % 4 == 3
    check(found, rows[~is_apart][:, None], rows[is_apart][:, None])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_names_the_site_and_the_batch(value):
    params = {"first": draw(3, 3), "second": draw(3, 2)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        return jnp.where(x > 5, value, jnp.tanh(x @ p["first"])) @ p["second"]

    batches = [draw(4, 3), draw(4, 3), 9 + draw(4, 3)]
    with pytest.raises(ValueError, match=r"'second' holds NaN or infinity in batch 2, or values"):
        sums(params, apply_fn, batches)


def test_a_position_with_outputs_far_above_all_others_counts_for_four():
    x = draw(64, 5)
    x[7] = 1000
    x[9] = 0  # and one that gives nothing counts as it is
    params = {"w": draw(5, 3)}
    found = sums(params, lambda p, x: x @ p["w"], [x])["w"][()]
    counted = weights_of(x @ params["w"])
    assert counted[7] < 1e-4
    check(found, x[:48, None], x[48:, None], counted)
