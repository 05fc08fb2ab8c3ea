"""Attention is found however it is written, and nothing else is."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxquant.graph import operators, trace

B, T, S, H, D = 2, 9, 11, 4, 6


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q, K, V = normal(0, B, T, H, D), normal(1, B, S, H, D), normal(2, B, S, H, D)


def found(function, *inputs):
    graph = trace.trace(lambda params, *xs: function(*xs), {}, inputs)
    return [
        each
        for each in operators.find_operators(graph, ["attention"]).values()
        if each.kind == "attention"
    ]


def by_einsum(q, k, v, *, mask=None, bias=None, scale=0.4, fill=-1e9):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, fill)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize(
    "attention",
    [
        jax.nn.dot_product_attention,
        functools.partial(jax.nn.dot_product_attention, is_causal=True),
        nn.dot_product_attention,
        nnx.dot_product_attention,
        by_einsum,
        functools.partial(by_einsum, mask=np.tri(T, S, dtype=bool)),
        functools.partial(by_einsum, bias=normal(3, H, T, S)),
    ],
)
def test_as_packages_and_users_write_it(attention):
    (one,) = found(attention, Q, K, V)
    assert one.params["layout"].value[:2] == (0, 2)


def by_matmul(q, k, v, *, mask=None, bias=None):
    """Heads first, and by `@`, which takes the axis of a batch of one out of each product."""
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    scores = q @ jnp.swapaxes(k, -1, -2) * 0.4
    scores = scores if bias is None else scores + bias
    scores = scores if mask is None else jnp.where(mask, scores, -1e9)
    return jax.nn.softmax(scores) @ v


def half_by_matmul(q, k, v):
    """One head: the first product keeps the axis of a batch of one, the second does not."""
    scores = jnp.einsum("bld,bmd->blm", q[:, :, 0], k[:, :, 0])
    return jax.nn.softmax(scores) @ v[:, :, 0]


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("rows", [1, T])
@pytest.mark.parametrize(
    "options", [{}, {"mask": np.tri(T, S, dtype=bool)}, {"bias": normal(3, H, T, S)}]
)
def test_a_batch_of_one_by_matmul(batch: int, rows: int, options):
    options = {name: value[..., -rows:, :] for name, value in options.items()}
    attention = functools.partial(by_matmul, **options)
    (one,) = found(attention, Q[:batch, :rows], K[:batch], V[:batch])
    assert len(one.params["layout"].result) == (3 if batch == 1 else 4)
    assert found(half_by_matmul, Q[:batch, :rows], K[:batch], V[:batch])


def test_what_is_beside_the_scores():
    mask, bias = np.ones((B, 1, 1, S), bool), normal(3, H, T, S)

    def net(q, k, v, mask, bias):
        return by_einsum(q, k, v, mask=mask, bias=bias, scale=0.5, fill=-3e4)

    (one,) = found(net, Q, K, V, mask, bias)
    assert one.params["scale"] == 0.5
    assert one.params["fill"] == -3e4
    (of_bias,), (of_mask,) = one.params["biases"], one.params["masks"]
    assert of_bias.varying == {1, 2, 3}
    assert of_mask.varying == {0, 3}
    assert of_mask.axes == (0, 1, 3, 2)
    assert not of_mask.negated


def test_a_mask_may_tell_what_is_left_out():
    def net(q, k, v, hidden):
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(jnp.where(hidden, -1e9, scores)), v)

    (one,) = found(net, Q, K, V, np.ones((B, H, T, S), bool))
    assert one.params["masks"][0].negated


def test_several_masks_are_one():
    def net(q, k, v, padding):
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        scores = jnp.where(padding, scores, -1e9)
        scores = jnp.where(np.tri(T, S, dtype=bool), scores, -1e9)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)

    (one,) = found(net, Q, K, V, np.ones((B, 1, 1, S), bool))
    assert len(one.params["masks"]) == 2


def test_heads_that_share_keys_are_a_batch_axis():
    def net(q, k, v):
        scores = jnp.einsum("btkgd,bskd->bkgts", q, k)
        return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v)

    (one,) = found(net, Q.reshape(B, T, 2, 2, D), K[:, :, :2], V[:, :, :2])
    layout = one.params["layout"]
    assert layout.query == layout.result == (0, 2, 3, 1, 4)  # 9 rows, not the 2 of a group
    assert layout.key == layout.value == (0, 2, None, 1, 3)


def test_one_head_without_a_batch():
    def net(q, k, v):
        return jnp.einsum("ts,sd->dt", jax.nn.softmax(q @ k.T), v)

    (one,) = found(net, Q[0, :, 0], K[0, :, 0], V[0, :, 0])
    assert one.params["layout"].value == (0, 1)
    assert one.params["layout"].result == (1, 0)


def capped(q, k, v):
    scores = 30 * jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, k) / 30)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def scaled_behind_a_mask(q, k, v):
    scores = jnp.where(np.tri(T, S, dtype=bool), jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores / 3), v)


def along_the_rows(q, k, v):
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=2), v)


def with_its_weights(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", weights, v), weights


def two_fills(q, k, v):
    scores = jnp.where(np.tri(T, S, dtype=bool), jnp.einsum("bthd,bshd->bhts", q, k), -1e9)
    scores = jnp.where(np.tri(T, S, k=2, dtype=bool), scores, -1.0)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


@pytest.mark.parametrize(
    "other", [capped, scaled_behind_a_mask, along_the_rows, with_its_weights, two_fills]
)
def test_what_no_kernel_does(other):
    assert found(other, Q, K, V) == []


def test_bfloat16_is_found_and_other_dtypes_are_left_as_they_are():
    narrow, half = ([x.astype(d) for x in (Q, K, V)] for d in (jnp.bfloat16, jnp.float16))
    assert len(found(by_einsum, *narrow)) == 1
    assert found(by_einsum, *half) == []
