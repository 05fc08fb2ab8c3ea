"""ONNX files of embeddings whose tables are integers."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.deploy.onnx import runtime
from tests.deploy.onnx.test_stored import EXACT

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


def tied(p, ids):
    """Logits of an output layer that reads the table: [B, T, 64]."""
    return jnp.tanh(p["words"][ids]) @ p["words"].T


TIED = {
    "static": lambda p, ids: jaxquant.quant_post(p, tied, [ids], progress=False),
    "dynamic": lambda p, ids: jaxquant.quant_dynamic(p, tied, ids, progress=False),
    "weights": lambda p, ids: jaxquant.quant_weights(p, tied, ids, progress=False),
    "groups": lambda p, ids: jaxquant.quant_weights(p, tied, ids, group_size=16, progress=False),
}


CASES = [
    ("static", "any", "any"),
    ("static", "onnxruntime", "vnni"),
    ("dynamic", "any", "any"),
    ("dynamic", "any", "vnni"),
    ("weights", "any", "any"),
    ("weights", "onnxruntime", "any"),
    ("groups", "any", "any"),
]


@pytest.mark.parametrize(("way", "target", "processors"), CASES)
def test_a_tied_output_layer_reads_the_table(way, target, processors, tmp_path):
    params = {"words": networks.images(0, (64, 32))}
    ids = np.random.default_rng(0).integers(0, 64, (4, 5)).astype(np.int32)
    model, path = TIED[way](params, ids), tmp_path / "m.onnx"
    settings = {"runtime": target, "processors": processors, "shapes": "b, t"}
    jaxquant.export_onnx(path, *model, progress=False, **settings)
    large = [x for x in runtime.onnx.load(path).graph.initializer if np.prod(x.dims) >= 64 * 32]
    assert len(large) == 1
    # Its own option makes int8 weights uint8; of those that are dequantized it loads none.
    computes_integers = way in ("static", "dynamic")
    for options in ({}, {"session.x64quantprecision": "1"})[: 1 + computes_integers]:
        found = runtime.run(path, ids[:2, :3], **options, **EXACT)
        assert runtime.sqnr(model[1](model[0], ids[:2, :3]), found[0]) > 100
