"""Dots of few rows with stored weights: by kernels that read the integers, in loops too."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant import native
from tests import networks
from tests.native.cases import needs_kernels

pytestmark = needs_kernels

WIDTH, HIDDEN, LAYERS = 64, 96, 3
CALL = "jaxquant_stored"
FORMS = {
    "8 bits": functools.partial(jaxquant.quant_weights, weight_bits=8),
    "4 bits": functools.partial(jaxquant.quant_weights, weight_bits=4, group_size=32),
    "dynamic": jaxquant.quant_dynamic,
}


def step(p, x):
    """Dots with axes in every order, a tied table, and a scan over stacked weights in a while."""
    x = jnp.einsum("bk,khd->bhd", x, p["heads"])
    x = jnp.einsum("bhd,hdk->bk", x, p["out"])
    x = (p["left"] @ x.T).T

    def layer(h, q):
        return h + jnp.tanh(h @ q["up"]) @ q["down"], None

    def body(carry):
        count, h = carry
        return count + 1, jax.lax.scan(layer, h, p["layers"])[0]

    x = jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x))[1]
    return x @ p["table"].T


PARAMS = {
    "heads": networks.images(0, (WIDTH, 4, 16)),
    "out": networks.images(1, (4, 16, WIDTH)),
    "left": networks.images(2, (WIDTH, WIDTH)),
    "layers": {
        "up": networks.images(3, (LAYERS, WIDTH, HIDDEN)),
        "down": networks.images(4, (LAYERS, HIDDEN, WIDTH)),
    },
    "table": networks.images(5, (77, WIDTH)),
}
PARAMS = jax.tree.map(lambda w: jnp.asarray(w) / 8, PARAMS)


@pytest.fixture(scope="module", params=FORMS)
def quantized(request):
    shape = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
    return FORMS[request.param](PARAMS, step, shape, progress=False)


def calls(qapply, qparams, x) -> int:
    """The native calls that a program holds."""
    return len(re.findall(f"custom_call @{CALL}", jax.jit(qapply).lower(qparams, x).as_text()))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_kernels_give_what_xla_gives(quantized, rows):
    qparams, qapply = quantized
    x = networks.images(9, (rows, WIDTH))
    assert qapply.backend.name == "native"
    assert calls(qapply, qparams, x) == 6
    by_xla = qapply.with_backend("xla")
    assert calls(by_xla, qparams, x) == 0
    expected = by_xla(qparams, x)
    size = np.abs(expected).max()
    # A rounding that goes the other way is a step of an int8 row, in the dynamic form.
    near = 2e-2 if qapply.plan.mode == "dynamic" else 1e-5
    np.testing.assert_allclose(qapply(qparams, x), expected, atol=near * size)


def test_more_rows_of_the_last_axis_are_left_to_xla(quantized):
    """And int8 ones, whose weight would have to be packed first."""
    qparams, qapply = quantized
    x = networks.images(9, (17, WIDTH))
    left = 6 if qapply.plan.mode == "dynamic" else 2
    assert calls(qapply, qparams, x) == 6 - left
    expected = qapply.with_backend("xla")(qparams, x)
    size = np.abs(expected).max()
    near = 2e-2 if qapply.plan.mode == "dynamic" else 1e-5
    np.testing.assert_allclose(qapply(qparams, x), expected, atol=near * size)


@pytest.mark.parametrize("rows", [17, 40])
def test_many_int8_rows_are_packed(rows):
    """In the call, or before; of few rows the weight is read as it is stored nevertheless."""
    if not native.int8_is_faster().available:
        pytest.skip("XLA is faster here")
    qparams, qapply = jaxquant.quant_dynamic(PARAMS, step, networks.images(9, (1, WIDTH)))
    prepared = qapply.prepare(qparams)
    assert len(prepared["packed"]) == 6
    x = networks.images(9, (rows, WIDTH))
    text = jax.jit(qapply).lower(prepared, x).as_text()
    assert len(re.findall("custom_call @jaxquant_dot", text)) == 6
    assert "jaxquant_pack" not in text
    assert calls(qapply, prepared, x[:8]) == 6
    expected = qapply.with_backend("xla")(qparams, x)
    for arrays in (qparams, prepared):
        np.testing.assert_allclose(qapply(arrays, x), expected, atol=2e-2 * np.abs(expected).max())


def test_sums_of_more_terms_than_a_float_holds():
    """Integers all at their ends: 3001 products of 127 * 127 are beyond 2 ** 24."""
    x, w = jnp.ones((40, 3001)).at[:, ::2].set(0.9), jnp.ones((3001, 5))
    qparams, qapply = jaxquant.quant_dynamic({"w": w}, lambda p, x: x @ p["w"], x)
    want = qapply.with_backend("xla")(qparams, x)
    native = qapply.with_backend("native")
    np.testing.assert_array_equal(native(qparams, x), want)
    np.testing.assert_array_equal(native(native.prepare(qparams), x), want)


def test_samples_that_are_mapped(quantized):
    qparams, qapply = quantized
    x = jnp.asarray(networks.images(9, (5, 2, WIDTH)))
    found = jax.vmap(lambda x: qapply(qparams, x))(x)
    expected = jnp.stack([qapply(qparams, each) for each in x])
    near = 2e-2 if qapply.plan.mode == "dynamic" else 1e-5
    np.testing.assert_allclose(found, expected, atol=near * np.abs(expected).max())


def test_an_export_holds_no_call(quantized):
    qparams, qapply = quantized
    x = networks.images(9, (2, WIDTH))
    exported = jax.export.export(jax.jit(qapply))(qparams, x)
    assert CALL not in exported.mlir_module()
    expected = qapply.with_backend("xla")(qparams, x)
    size = np.abs(expected).max()
    np.testing.assert_allclose(exported.call(qparams, x), expected, atol=2e-2 * size)


def test_there_is_nothing_to_pack_of_weights_alone(quantized):
    qparams, qapply = quantized
    if qapply.plan.mode != "dynamic":
        assert qapply.prepare(qparams).keys() == qparams.keys()
