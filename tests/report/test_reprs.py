"""What a notebook shows: tables and single lines, never a flood of numbers."""

import re

import jax.numpy as jnp
import numpy as np

import jaxquant
from tests import networks

MOST = 2000  # characters


def test_everything_that_is_returned_shows_itself_shortly(tmp_path):
    params = networks.plain_params()
    x = np.random.default_rng(0).normal(size=networks.IMAGE).astype(np.float32)
    observations = jaxquant.calibrate(params, networks.plain_net, [x], progress=False)
    qparams, qapply = jaxquant.quantize(params, networks.plain_net, observations)
    path = tmp_path / "model.safetensors"
    jaxquant.save_quantized_model(path, qparams, qapply)
    loaded = jaxquant.load_quantized_model(path)[1]
    assert repr(observations) == (
        "<Observations of 4 tensors over 4 samples in 1 batches; .tensors has each>"
    )
    assert "4 of 4 sites quantized (static), thresholds by KL" in repr(qapply)
    assert repr(loaded) == repr(qapply)
    stats = observations.tensors["head/input"]
    shown = [observations, qapply, loaded, stats, qapply.report(), jaxquant.describe(qparams)]
    assert all(len(repr(value)) < MOST for value in shown)
    for value in (qapply, loaded, qapply.report(), jaxquant.describe(qparams)):
        html = value._repr_html_()
        assert html.count("<table>") == html.count("</table>") == 1
        assert not re.search(r"array\(", html)


def test_a_description_lists_every_array():
    tree = {"b": jnp.zeros((2, 3), jnp.int8), "a": {str(n): jnp.zeros(1) for n in range(50)}}
    found = jaxquant.describe(tree)
    assert len(found.rows) == 51
    assert found.rows[-1] == ("b", "int8", "2, 3", 6)
    assert "and 11 more; .rows has all" in str(found)
    assert "51 arrays, 206 bytes." in str(found)
    assert found._repr_html_().count("<tr") == 52
