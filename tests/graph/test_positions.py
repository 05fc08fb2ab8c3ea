"""The axes of samples and positions, followed through single functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.graph.model import FloatModel
from jaxquant.graph.positions import find_positions

B, T, D = 3, 4, 6
MASK = np.arange(T) < np.array([4, 2, 0])[:, None]
W = jnp.ones((D, 5))


def real(function: Callable[..., Any], *inputs: jax.Array) -> tuple[np.ndarray | None, str]:
    """Which entries of what a function of x [B, T, D] (and the mask) gives count, and what lost."""
    x = jnp.ones((B, T, D))
    model = FloatModel(lambda p, *args: function(*args), {"w": W}).trace((x, MASK, *inputs))
    positions = find_positions(model, ((0, 0), (1, 0)), (1,))
    (var,) = model.graph.outputs
    entries = positions.real(model, var, [jnp.asarray(MASK)])
    shape = model.graph.shape(var)
    return (
        None if entries is None else np.broadcast_to(entries, shape),
        positions.lost(model, var),
    )


def scan_of_layers(x: jax.Array, mask: Any) -> jax.Array:
    return lax.scan(lambda x, w: (jnp.tanh(x * w), None), x, jnp.ones(3))[0]


def scan_over_time(x: jax.Array, mask: Any) -> jax.Array:
    def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = jnp.tanh(state + x)
        return state, state

    return lax.scan(step, jnp.zeros((B, D)), x.swapaxes(0, 1))[1]


def attention(x: jax.Array, mask: Any, fill: float, until: str) -> jax.Array:
    scores = jnp.einsum("btd,bsd->bts", x, x)
    if until == "scores":
        return scores
    scores = jnp.where(mask[:, None, :], scores, fill)
    return scores if until == "masked" else jax.nn.softmax(scores)


ROWS = np.broadcast_to(MASK[..., None], (B, T, D))
PAIRS = MASK[:, :, None] & MASK[:, None, :]


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x, m: jnp.tanh(x) + 1.0, ROWS),
        (lambda x, m: x @ W, ROWS[..., :5]),
        (lambda x, m: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True)), ROWS),
        (lambda x, m: x.reshape(B, T, 2, 3).transpose(0, 2, 1, 3), ROWS.reshape(B, T, 2, 3)
         .transpose(0, 2, 1, 3)),
        (lambda x, m: x.reshape(B * T, D) @ W, ROWS.reshape(-1, D)[:, :5]),
        (lambda x, m: x.reshape(B * T, D).reshape(B, T, D), ROWS),
        (lambda x, m: x.swapaxes(0, 1).reshape(T * B, D), ROWS.swapaxes(0, 1).reshape(-1, D)),
        (lambda x, m: x.reshape(B, T * D), ROWS.reshape(B, T * D)),
        (lambda x, m: x[:, 0], np.broadcast_to(MASK.any(1)[:, None], (B, D))),
        (lambda x, m: x.max(axis=1), np.broadcast_to(MASK.any(1)[:, None], (B, D))),
        (lambda x, m: x * m[..., None].astype(x.dtype), ROWS),
        (lambda x, m: jnp.where(m[..., None], x, 0.0), ROWS),
        (lambda x, m: jnp.ones((9, D)).at[0].set(2.0)[m.astype(jnp.int32)] * x, ROWS),
        (lambda x, m: jax.vmap(jax.vmap(lambda row: row @ W))(x), ROWS[..., :5]),
        (lambda x, m: jnp.split(x, [4], axis=-1)[0], ROWS[..., :4]),
        (lambda x, m: lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2), (1, 1, 2), "VALID"),
         ROWS[..., :3]),
        (lambda x, m: jnp.stack([x, -x], axis=1), np.stack([ROWS, ROWS], axis=1)),
        (lambda x, m: jnp.pad(x, ((0, 0), (0, 0), (1, 2))), np.repeat(ROWS[..., :1], D + 3, -1)),
        (lambda x, m: jnp.split(x, [4], axis=-1)[1], ROWS[..., :2]),
        (lambda x, m: x + jnp.sin(jnp.cumsum(m.astype(x.dtype), axis=1))[..., None], ROWS),
        (lambda x, m: x + 0.1 * jnp.cumsum(m, axis=1).astype(x.dtype)[..., None], ROWS),
        (lambda x, m: jnp.sin(x[..., :1]) * jnp.arange(6.0)[None, None], ROWS),
        (lambda x, m: jnp.where(~m[..., None], jnp.arange(6.0), x), ROWS),  # a hidden word
        (scan_of_layers, ROWS),
        (scan_over_time, ROWS.swapaxes(0, 1)),
        (lambda x, m: lax.map(jnp.tanh, x), ROWS),
        (lambda x, m: lax.cond(x[0, 0, 0] > 0, jnp.tanh, jnp.sin, x), ROWS),
        (lambda x, m: lax.fori_loop(0, 3, lambda k, x: jnp.tanh(x), x), ROWS),
        (lambda x, m: attention(x, m, -1e9, "scores"), PAIRS),
        (lambda x, m: attention(x, m, -1e9, "softmax"), PAIRS),
    ],
)  # fmt: skip
def test_positions_that_are_known(function: Callable[..., Any], wanted: np.ndarray):
    found, lost = real(function)
    assert not lost
    np.testing.assert_array_equal(found, wanted)


def test_what_a_mask_fills_in_is_read():
    """The softmax reads -1e9 at keys that are padding: it has to stay in the range."""
    found, lost = real(lambda x, m: attention(x, m, -1e9, "masked"))
    assert not lost
    np.testing.assert_array_equal(found, np.broadcast_to(MASK[:, :, None], PAIRS.shape))


def test_what_pairs_of_positions_fill_in_is_read():
    def masked(x: jax.Array, mask: Any) -> jax.Array:
        pairs = jnp.einsum("bt,bs->bts", mask.astype(x.dtype), mask.astype(x.dtype))
        return attention(x, mask, 0.0, "scores") + (1 - pairs) * -20.0

    found, lost = real(masked)
    assert not lost
    np.testing.assert_array_equal(found, np.broadcast_to(MASK.any(1)[:, None, None], PAIRS.shape))


def test_a_mask_itself_is_read():
    assert real(lambda x, m: m.astype(jnp.float32)[:, None]) == (None, "")


@pytest.mark.parametrize(
    ("function", "primitive"),
    [
        (lambda x, m: x[:, 1:], "slice"),
        (lambda x, m: x[:, ::-1], "rev"),
        (lambda x, m: jnp.sort(x, axis=1), "sort"),
        (lambda x, m: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), "pad"),
        (lambda x, m: jnp.concatenate([jnp.zeros((B, 1, D)), x], axis=1), "concatenate"),
        (lambda x, m: jnp.tanh(jnp.concatenate([x, -x], axis=0)), "concatenate"),
        (lambda x, m: jnp.einsum("btd,csd->btcs", x, x), "dot_general"),
        (lambda x, m: x[:2], "slice"),
        (lambda x, m: lax.reduce_window(x, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME"),
         "reduce_window_sum"),
        (lambda x, m: jnp.split(x, [1], axis=1)[1], "split"),
        (lambda x, m: x.reshape(B, 2, 2 * D), "reshape"),
        (lambda x, m: x.reshape(D, B, T), "reshape"),
        (lambda x, m: lax.conv_general_dilated(
            x, jnp.ones((3, D, D)), (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")),
         "conv_general_dilated"),
        (lambda x, m: jnp.fft.fft(x, axis=1).real, "fft"),
    ],
)  # fmt: skip
def test_positions_that_are_lost(function: Callable[..., Any], primitive: str):
    assert real(function)[1] == primitive


def test_a_convolution_of_single_positions_keeps_them():
    dimensions = ("NTC", "TIO", "NTC")
    found, lost = real(
        lambda x, m: lax.conv_general_dilated(
            x, jnp.ones((1, D, 5)), (1,), "VALID", dimension_numbers=dimensions
        )
    )
    assert not lost
    np.testing.assert_array_equal(found, ROWS[..., :5])
