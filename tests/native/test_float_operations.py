"""Attention, GELU and layer normalization in one pass are NumPy's, in any order of axes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant import native
from jaxquant.native import AttentionAxes
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

USUAL = (0, 2, 1, 3)  # [batch, rows, heads, depth]
BESIDE = (0, 1, 2, 3)  # [batch, heads, keys, rows]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference(q, k, v, bias=None, mask=None, scale=1.0, fill=-np.inf) -> np.ndarray:
    """In float64, of tensors in the usual order."""
    scores = np.einsum("bthd,bshd->bhts", q.astype(np.float64), k.astype(np.float64)) * scale
    scores = scores if bias is None else scores + bias.transpose(0, 1, 3, 2)
    scores = scores if mask is None else np.where(mask.transpose(0, 1, 3, 2), scores, fill)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhts,bshd->bthd", weights, v.astype(np.float64))


@pytest.mark.parametrize(
    ("rows", "keys", "depth", "values"),
    [
        (8, 5, 7, 3),
        (1, 1, 1, 1),
        (65, 33, 16, 20),
        (130, 64, 32, 32),
        (1, 70, 64, 80),
        (3, 37, 5, 9),
    ],
)
@pytest.mark.parametrize("beside", ["nothing", "bias", "mask of keys", "both"])
def test_values(rows: int, keys: int, depth: int, values: int, beside: str):
    q, k = normal(0, 2, rows, 3, depth), normal(1, 2, keys, 3, depth)
    v, bias, mask = normal(2, 2, keys, 3, values), None, None
    if beside in ("bias", "both"):
        bias = normal(3, 1, 3, keys, rows)
    if beside in ("mask of keys", "both"):
        until = np.array([keys // 2, keys]).reshape(2, 1, 1, 1)
        mask = np.arange(keys).reshape(1, 1, keys, 1) <= until
    axes = AttentionAxes(
        USUAL, USUAL, USUAL, USUAL, BESIDE if bias is not None else (),
        BESIDE if mask is not None else (),
    )  # fmt: skip
    got = jax.jit(
        lambda *xs: native.attention(*xs, axes=axes, scale=0.4, fill=-1e9)
    )(q, k, v, bias, mask)  # fmt: skip
    np.testing.assert_allclose(got, reference(q, k, v, bias, mask, 0.4, -1e9), atol=2e-5)


def test_axes_in_any_order_and_keys_that_heads_share():
    q, k, v = normal(0, 2, 9, 4, 6), normal(1, 2, 11, 4, 6), normal(2, 2, 11, 4, 6)
    shared = AttentionAxes(
        query=(2, 1, 3, 0), key=(0, None, 2, 1), value=(1, None, 2, 0), result=(3, 0, 1, 2)
    )
    got = native.attention(
        jnp.asarray(q.transpose(3, 2, 0, 1)),
        jnp.asarray(k[:, :, 0].transpose(0, 2, 1)),
        jnp.asarray(v[:, :, 0].transpose(2, 0, 1)),
        axes=shared,
    )
    one = [np.repeat(x[:, :, :1], 4, axis=2) for x in (k, v)]
    want = reference(q, *one).transpose(2, 1, 3, 0)
    np.testing.assert_allclose(got, want, atol=2e-5)


ORDERS = {
    "[batch, keys, heads, depth]": ((0, 1, 2, 3), (0, 2, 1, 3)),
    "[batch, heads, keys, depth]": ((0, 2, 1, 3), (0, 1, 2, 3)),
    "[batch, heads, depth, keys]": ((0, 2, 3, 1), (0, 1, 3, 2)),
    "[batch, depth, keys, heads]": ((0, 3, 1, 2), (0, 3, 2, 1)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_few_rows_read_keys_and_values_as_they_lie(order: str, dtype):
    """The batch axes have their sizes in front, whichever order a tensor has its axes in."""
    q, k, v = normal(0, 2, 2, 3, 21), normal(1, 2, 70, 3, 21), normal(2, 2, 70, 3, 35)
    k, v = (np.asarray(jnp.asarray(x, dtype)) for x in (k, v))
    moved, axes = ORDERS[order]
    call = AttentionAxes(USUAL, axes, axes, USUAL)
    got = native.attention(
        q, *(jnp.asarray(x.transpose(moved)) for x in (k, v)), axes=call, scale=0.2
    )
    want = reference(q, k.astype(np.float32), v.astype(np.float32), scale=0.2)
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("rows", [9, 7])
def test_nan_and_rows_without_a_key_are_seen(rows: int):
    q, k, v = normal(0, 1, rows, 2, 6), normal(1, 1, 11, 2, 6), normal(2, 1, 11, 2, 6)
    q[0, 3, 1, 0] = np.nan
    mask = np.ones((1, 2, 11, rows), bool)
    mask[0, 0, :, 5] = False
    axes = AttentionAxes(USUAL, USUAL, USUAL, USUAL, mask=BESIDE)
    got = np.asarray(native.attention(q, k, v, None, mask, axes=axes))
    bad = np.zeros((1, rows, 2), bool)
    bad[0, 3, 1] = bad[0, 5, 0] = True
    np.testing.assert_array_equal(np.isnan(got), np.broadcast_to(bad[..., None], got.shape))


def test_a_row_has_the_same_bits_in_any_company():
    q, k, v = normal(0, 3, 70, 2, 16), normal(1, 3, 11, 2, 16), normal(2, 3, 11, 2, 16)
    axes = AttentionAxes(USUAL, USUAL, USUAL, USUAL)
    whole = native.attention(q, k, v, axes=axes)
    np.testing.assert_array_equal(native.attention(q[1:2], k[1:2], v[1:2], axes=axes)[0], whole[1])
    np.testing.assert_array_equal(native.attention(q[:, :9], k, v, axes=axes), whole[:, :9])
    few = native.attention(q[:, :7], k, v, axes=axes)
    np.testing.assert_array_equal(
        native.attention(q[2:, 3:4], k[2:], v[2:], axes=axes), few[2:, 3:4]
    )


@pytest.mark.parametrize("shown", [(0, 1), (0, 37), (21, 40), (69, 70), (0, 0)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fill", [-1e9, -3.0, np.finfo(np.float32).min])
def test_keys_that_are_hidden_from_few_rows(shown: tuple[int, int], order: str, fill: float):
    """A cache that is not full, and a window: with the bits of all keys that are looked at."""
    q, k, v = normal(0, 2, 3, 2, 21), normal(1, 2, 70, 2, 21), normal(2, 2, 70, 2, 35)
    moved, axes = ORDERS[order]
    keys = np.arange(70)
    mask = ((keys >= shown[0]) & (keys < shown[1])).reshape(1, 1, 70, 1)
    there = [q, *(jnp.asarray(x.transpose(moved)) for x in (k, v))]
    call = AttentionAxes(USUAL, axes, axes, USUAL, mask=BESIDE)
    got = native.attention(*there, None, mask, axes=call, scale=0.2, fill=fill)
    np.testing.assert_allclose(got, reference(q, k, v, None, mask, 0.2, fill), atol=2e-5)
    if shown == (0, 0):
        return
    bits = []
    for low in (fill, -1e9):  # the first is seen beforehand if it is low enough, the second not
        bias = np.where(mask, 0, low).astype(np.float32)
        call = AttentionAxes(USUAL, axes, axes, USUAL, bias=BESIDE)
        by_bias = native.attention(*there, bias, axes=call, scale=0.2)
        np.testing.assert_allclose(by_bias, reference(q, k, v, bias, None, 0.2), atol=2e-5)
        bits.append(by_bias)
    if fill != -3.0:
        np.testing.assert_array_equal(got, bits[0])
        np.testing.assert_array_equal(got, bits[1])


@pytest.mark.parametrize("rows", [9, 1])
def test_vmap_is_one_call(rows: int):
    q, k, v = normal(0, 5, 2, rows, 2, 6), normal(1, 2, 11, 2, 6), normal(2, 5, 2, 11, 2, 6)
    mask = np.random.default_rng(0).random((5, 2, 1, 11, 1)) < 0.7
    axes = AttentionAxes(USUAL, USUAL, USUAL, USUAL, mask=BESIDE)

    def one(q, k, v, mask):
        return native.attention(q, k, v, None, mask, axes=axes, fill=-1e9)

    mapped = jax.vmap(one, (0, None, 0, 0))
    want = [one(q[i], k, v[i], mask[i]) for i in range(5)]
    np.testing.assert_array_equal(mapped(q, k, v, mask), np.stack(want))
    assert "while" not in str(jax.make_jaxpr(mapped)(q, k, v, mask))


def test_no_samples():
    axes = AttentionAxes(USUAL, USUAL, USUAL, USUAL)
    empty = jnp.zeros((0, 9, 2, 6))
    assert native.attention(empty, empty, empty, axes=axes).shape == (0, 9, 2, 6)
    no_keys = jnp.zeros((3, 0, 2, 6))
    for rows in (1, 9):
        of_nothing = native.attention(jnp.ones((3, rows, 2, 6)), no_keys, no_keys, axes=axes)
        np.testing.assert_array_equal(of_nothing, np.zeros((3, rows, 2, 6)))
    assert native.layer_norm(jnp.zeros((0, 4)), None, None, epsilon=1e-6).shape == (0, 4)
    assert native.gelu(jnp.zeros((0, 4)), approximate=True).shape == (0, 4)


def test_what_attention_refuses():
    x = jnp.zeros((1, 9, 2, 6))
    axes = AttentionAxes(USUAL, USUAL, USUAL, USUAL)
    with pytest.raises(ValueError, match="a bias and a mask have axes"):
        native.attention(x, x, x, x, axes=axes)
    half = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="float32, float32, bfloat16; expected"):
        native.attention(x[:, :1], x, half, axes=axes)
    with pytest.raises(ValueError, match="float32, bfloat16, bfloat16; expected float32, float32"):
        native.attention(x, half, half, axes=axes)
    with pytest.raises(Exception, match="wrong shapes"):
        native.attention(x, x, x[:, :4], axes=axes).block_until_ready()


@pytest.mark.parametrize("approximate", [False, True])
def test_gelu_is_as_exact_as_jax_has_it(approximate: bool):
    x = np.concatenate([np.linspace(-12, 12, 5003), [1e30, -1e30, 0, 1e-30]]).astype(np.float32)
    with jax.enable_x64(True):
        want = np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float64), approximate=approximate))
    np.testing.assert_allclose(
        native.gelu(jnp.asarray(x), approximate=approximate), want, atol=6e-7, rtol=2e-7
    )
    odd = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(
        native.gelu(odd, approximate=approximate), jax.nn.gelu(odd, approximate=approximate)
    )


def test_gelu_in_int8_is_the_rounded_one():
    x = jnp.asarray(normal(0, 3, 5, 37) * 4)
    out = native.Requantize(np.float32(31.0), -100)
    y = np.asarray(native.gelu(x, approximate=False))
    want = np.clip(np.round(y * np.float32(31.0)) - 100, -128, 127)
    np.testing.assert_array_equal(native.gelu(x, approximate=False, out=out), want)

    def each(x, scale):
        return native.gelu(x, approximate=False, out=native.Requantize(scale, -100))

    scales = jnp.asarray([31.0, 31.0, 7.0])
    got = jax.vmap(each)(x, scales)
    np.testing.assert_array_equal(got[:2], want[:2])
    np.testing.assert_array_equal(got[2], each(x[2], scales[2]))


@pytest.mark.parametrize("columns", [1, 7, 16, 100])
@pytest.mark.parametrize("has", ["scale", "bias", "scale and bias", "neither"])
def test_layer_norm(columns: int, has: str):
    x = normal(0, 3, 5, columns) + 100
    scale = normal(1, columns) if "scale" in has else None
    bias = normal(2, columns) if "bias" in has else None
    wide = x.astype(np.float64)
    want = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3)
    want = want * (1 if scale is None else scale) + (0 if bias is None else bias)
    norm = jax.jit(lambda *xs: native.layer_norm(*xs, epsilon=1e-3))
    got = norm(x, scale, bias)
    np.testing.assert_allclose(got, want, atol=1e-4)
    mapped = jax.vmap(norm, (0, None, None))(x, scale, bias)
    np.testing.assert_array_equal(mapped, got)


def test_layer_norm_of_scales_that_differ():
    x, scale = normal(0, 3, 5, 8), normal(1, 3, 8)

    def norm(x, scale):
        return native.layer_norm(x, scale, None, epsilon=1e-6)

    want = np.stack([norm(x[i], scale[i]) for i in range(3)])
    np.testing.assert_array_equal(jax.vmap(norm)(x, scale), want)
    with pytest.raises(ValueError, match="expected float32 x"):
        native.layer_norm(jnp.asarray(x[0]), jnp.asarray(scale[0, :4]), None, epsilon=1e-6)


@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (2, 3, 100), (1, 20_000), (4, 0)])
@pytest.mark.parametrize("channels", [None, 1, 4])
def test_in_int8_on_one_grid(shape: tuple[int, ...], channels: int | None):
    x = 20 * normal(0, *shape, channels or 1).reshape(*shape[:-1], -1)
    scales = np.full((), 1.7, np.float32)
    if channels is not None:
        scales = np.random.default_rng(1).uniform(0.5, 2, channels).astype(np.float32)
    q, marks = native.quantize(jnp.asarray(x), jnp.asarray(scales), -5)
    inverse = scales if channels is None else np.tile(scales, shape[-1])
    np.testing.assert_array_equal(q, np.clip(np.round(x * inverse) - 5, -128, 127))
    np.testing.assert_array_equal(marks, np.zeros(shape[:-1]))

    mapped = jax.vmap(native.quantize, (0, None, None))(x[None], jnp.asarray(scales), -5)
    np.testing.assert_array_equal(mapped[0][0], q)
    each = jax.vmap(native.quantize, (None, 0, None))(x, jnp.stack([scales, 2 * scales]), -5)
    np.testing.assert_array_equal(each[0][0], q)
    np.testing.assert_array_equal(each[0][1], np.clip(np.round(x * 2 * inverse) - 5, -128, 127))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("columns", [3, 17, 9000])
def test_what_int8_cannot_hold_marks_its_row(odd: float, columns: int):
    x = normal(0, 4, columns)
    x[1, -1], x[3, 0] = odd, odd
    _, marks = native.quantize(jnp.asarray(x), jnp.float32(3.0), 0)
    np.testing.assert_array_equal(np.isnan(marks), [False, True, False, True])


def test_rows_that_are_not_of_whole_channels():
    with pytest.raises(ValueError, match="rows of 7 numbers are not of 2 channels"):
        native.quantize(jnp.zeros((3, 7), jnp.float32), jnp.ones(2, jnp.float32), 0)


@pytest.mark.parametrize("columns", [1, 7, 16, 100])
@pytest.mark.parametrize("is_asymmetric", [False, True])
def test_rows_in_int8(columns: int, is_asymmetric: bool):
    x = normal(0, 3, 5, columns)
    x[0, 0], x[1, 1] = 0, np.abs(x[1, 1])
    quantize = functools.partial(
        native.quantize_rows, is_asymmetric=is_asymmetric, smallest_scale=2.0**-126
    )
    q, scale, zero_point = (np.asarray(each) for each in quantize(jnp.asarray(x)))
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    one = np.float32(1)
    if is_asymmetric:
        half = high * np.float32(0.5) - low * np.float32(0.5)
        want = np.maximum(half * np.float32(2 / 255), np.float32(2.0**-126))
        zero = np.clip(-128 - np.round(low * (one / want)), -128, 127)
        inverse = one / want
    else:
        most = np.maximum(np.maximum(high, -low), np.float32(127 * 2.0**-126))
        want, inverse, zero = most * np.float32(1 / 127), np.float32(127) / most, np.zeros((3, 5))
    np.testing.assert_array_equal(scale, want)
    np.testing.assert_array_equal(zero_point, zero)
    rounded = np.round(x * inverse[..., None]) + zero[..., None]
    np.testing.assert_array_equal(q, np.clip(rounded, -128, 127))
    mapped = jax.vmap(quantize)(jnp.asarray(x))
    for each, alone in zip(mapped, (q, scale, zero_point)):
        np.testing.assert_array_equal(each, alone)


def test_the_scale_of_a_row_with_nan_is_nan():
    x = normal(0, 4, 37)
    x[1, 36], x[2, 0] = np.nan, np.inf
    for is_asymmetric in (False, True):
        _, scale, _ = native.quantize_rows(
            jnp.asarray(x), is_asymmetric=is_asymmetric, smallest_scale=2.0**-126
        )
        assert np.isnan(scale[1])
        assert not np.isfinite(scale[2])
        assert np.isfinite(np.asarray(scale)[[0, 3]]).all()
