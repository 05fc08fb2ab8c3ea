"""ONNX files of embeddings whose tables are integers."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime

IDS = np.array([[0, 3, 12, 40], [7, 12, 1, -1]], np.int32)  # some are out of range
WAYS = {
    "8 bits": {},
    "8 bits in groups": {"group_size": 3},
    "4 bits": {"weight_bits": 4},
    "4 bits in groups": {"weight_bits": 4, "group_size": 3},
}


def net(p, ids):
    """The width is no multiple of two or of a group."""
    filled = jnp.take(p["words"], ids, axis=0)
    return filled, p["others"].at[ids].get(mode="clip")


@pytest.mark.parametrize("way", WAYS)
def test_rows(way, tmp_path):
    params = {"words": networks.images(0, (13, 7)), "others": networks.images(1, (13, 5))}
    model = jaxquant.quant_weights(params, net, IDS, progress=False, **WAYS[way])
    jaxquant.export_onnx(tmp_path / "m.onnx", *model, progress=False)
    expected, found = model[1](model[0], IDS), runtime.run(tmp_path / "m.onnx", IDS)
    assert np.isnan(expected[0]).any()
    for ours, theirs in zip(expected, found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)
