"""Loops in int8 programs: what each layer reads, packed for the kernels or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

pytestmark = pytest.mark.optimized


def layers(p, x):
    """Layers of stacked weights, and one weight that they have in common."""

    def layer(h, q):
        return h + jax.nn.gelu(h @ q["up"]) @ q["down"] @ p["shared"], None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["head"]


@pytest.fixture(scope="module")
def quantized():
    params = {
        "layers": {"up": networks.images(0, (3, 16, 32)), "down": networks.images(1, (3, 32, 16))},
        "shared": networks.images(2, (16, 16)),
        "head": networks.images(3, (16, 4)),
    }
    params = jax.tree.map(lambda w: jnp.asarray(w) / 4, params)
    x = jnp.asarray(networks.images(4, (8, 16)))
    return *jaxquant.quant_post(params, layers, [x], progress=False), x


def test_zero_points_differ_from_layer_to_layer(quantized):
    qparams, _, _ = quantized
    zero_points = np.asarray(qparams["tensors"]["layers/down/input"]["zero_point"])
    assert zero_points.shape == (3,)
    assert len(set(zero_points.tolist())) > 1


def test_weights_are_packed_for_each_layer_or_once(quantized):
    qparams, qapply, x = quantized
    if qapply.backend.name != "native":
        pytest.skip(f"no native kernels: {qapply.backend}")
    prepared = qapply.prepare(qparams)
    assert prepared["packed"]["layers/up"].shape[0] == 3
    assert prepared["packed"]["shared"].ndim == 1
    expected = qapply.with_backend("xla")(qparams, x)
    for arrays in (qparams, prepared):
        np.testing.assert_array_equal(qapply(arrays, x), expected)


def test_a_loop_over_the_samples_is_saved_for_any_number_of_them(tmp_path):
    params = {"a": networks.images(0, (16, 8)), "b": networks.images(1, (8, 4))}

    def apply_fn(p, x):
        return jax.lax.map(lambda row: jax.nn.relu(row @ p["a"]) @ p["b"], x)

    x = jnp.asarray(networks.images(4, (8, 16)))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [x], progress=False)
    path = tmp_path / "model.safetensors"
    jaxquant.save_quantized_model(path, qparams, qapply, progress=False)
    loaded_qparams, loaded = jaxquant.load_quantized_model(path)
    want = qapply.with_backend("xla")(qparams, x)
    for count in (8, 3):
        np.testing.assert_allclose(loaded(loaded_qparams, x[:count]), want[:count], rtol=1e-6)
