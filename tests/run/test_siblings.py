"""Dots of one tensor run as one product, and give what each gives alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant import native
from tests import networks

WIDTH = 64
SHAPES = {
    "query": (WIDTH, 48), "key": (WIDTH, 16), "value": (WIDTH, 2, 8), "turned": (24, WIDTH),
    "behind": (48, 16),
}  # fmt: skip
PARAMS = {name: networks.images(k, shape) for k, (name, shape) in enumerate(SHAPES.items())}
MODES = {
    "8 bits": functools.partial(jaxquant.quant_weights, group_size=32),
    "4 bits": functools.partial(jaxquant.quant_weights, weight_bits=4, group_size=32),
    "dynamic": jaxquant.quant_dynamic,
}
ROWS = networks.images(9, (3, WIDTH))


def layer(p, x):
    """Three that have a matrix [K, N] of x, one that has [N, K], and one of another tensor."""
    query = x @ p["query"]
    found = [query, jnp.tanh(x @ p["key"]), jnp.einsum("bi,ihd->bhd", x, p["value"])]
    return [*found, x @ p["turned"].T, query @ p["behind"]]


def alone(k, p, x):
    return layer(p, x)[k]


@pytest.mark.parametrize("mode", MODES)
def test_they_are_as_alone(mode):
    shape = jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype)
    qparams, qapply = MODES[mode](PARAMS, layer, shape, progress=False)
    found = jax.jit(qapply)(qparams, ROWS)
    for k, value in enumerate(found[:4]):
        form = functools.partial(alone, k)
        expected = jax.jit(MODES[mode](PARAMS, form, shape, progress=False)[1])
        own = MODES[mode](PARAMS, form, shape, progress=False)[0]
        np.testing.assert_array_equal(value, expected(own, ROWS))
    portable = jax.jit(qapply.with_backend("xla"))(qparams, ROWS)
    for natively, by_xla in zip(found, portable, strict=True):
        np.testing.assert_allclose(natively, by_xla, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not native.runs_here(), reason="the kernels do not run here")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_scanned", [False, True])
def test_one_call_for_all(mode, is_scanned):
    """Of five dots three calls: the first three together, [N, K] and the other tensor alone.

    Weights that meet int8 rows are stored as the dot takes them, so that all four are together.
    """
    apply_fn, params = layer, PARAMS
    if is_scanned:
        params = jax.tree.map(lambda w: jnp.stack([w, w / 2]), PARAMS)

        def apply_fn(p, x):
            return lax.scan(lambda carry, w: (carry, layer(w, carry)), x, p)[1]

    shape = jax.ShapeDtypeStruct(ROWS.shape, ROWS.dtype)
    qparams, qapply = MODES[mode](params, apply_fn, shape, progress=False)
    text = jax.jit(qapply).lower(qparams, ROWS).compile().as_text()
    assert text.count('custom_call_target="jaxquant_stored"') == (2 if mode == "dynamic" else 3)
