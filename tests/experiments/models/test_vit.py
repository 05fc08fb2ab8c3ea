"""The forms of the vision transformer give the same; its tokens are the patches and one more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxquant
from experiments.models import transformer, vit_nnx
from experiments.models.vit import Vit

SETTINGS = {"num_classes": 5, "patch": 2, "layers": 2, "width": 8, "heads": 2, "hidden": 12}
CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def params():
    images = jnp.zeros((1, 4, 4, 3), jnp.float32)
    return jax.jit(Vit(**SETTINGS).init)(jax.random.key(0), images)["params"]


def logits(params, images, **settings):
    return jax.jit(Vit(**SETTINGS, **settings).apply)({"params": params}, images)


def test_scanned_and_unrolled_layers_in_linen_and_nnx_give_the_same(params, rng):
    images = jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32)
    expected, loop = logits(params, images), transformer.unstack(params)
    assert expected.shape == (2, 5)
    np.testing.assert_allclose(logits(loop, images, scanned=False), expected, **CLOSE)
    for scanned, given in ((True, params), (False, loop)):
        model = vit_nnx.from_linen(given, **SETTINGS, size=4, scanned=scanned)
        graph, state = nnx.split(model)
        found = jax.jit(lambda state, x, graph=graph: nnx.merge(graph, state)(x))(state, images)
        np.testing.assert_allclose(found, expected, **CLOSE)


def test_where_a_patch_is_counts_by_its_position_alone(params, rng):
    images = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32)
    turned = jnp.roll(images, 2, axis=2)  # two columns of patches change places
    assert np.abs(logits(params, turned) - logits(params, images)).max() > 1e-4
    nowhere = {**params, "positions": jnp.zeros_like(params["positions"])}
    assert params["positions"].shape == (1, 5, 8)
    np.testing.assert_allclose(logits(nowhere, turned), logits(nowhere, images), **CLOSE)


def test_in_nnx_it_is_quantized(params, rng):
    """All convolutions and dots with a weight are int8, in the scan over layers too."""
    images = jnp.asarray(rng.normal(size=(16, 4, 4, 3)), jnp.float32)
    graph, state = nnx.split(vit_nnx.from_linen(params, **SETTINGS, size=4, scanned=True))
    qparams, qapply = jaxquant.quant_post(
        state, lambda state, x: nnx.merge(graph, state)(x), images, batch_size=8, progress=False
    )
    rows = [row for row in qapply.report().rows if row["kind"] in ("mul", "conv2d")]
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"int8"}
    expected, found = logits(params, images), qapply(qparams, images)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
