"""Embeddings in int8: rows of a table, dequantized behind the lookup, in every mode alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks
from tests.networks import rows

PARAMS = {"table": networks.images(0, (50, 8)), "dense": networks.images(1, (8, 8))}
IDS = jnp.arange(12).reshape(3, 4)
OUT = jnp.full((3, 4), 60)  # behind the last row, and before the first
QUIET = {"progress": False}


def tied(p, ids):
    """The rows, and the scores of an output layer that shares the table."""
    x = jnp.take(p["table"], ids, axis=0)
    return x, jnp.tanh(x @ p["dense"]) @ p["table"].T


def static(params, apply_fn, **options):
    return jaxquant.quant_post(params, apply_fn, [IDS], **QUIET, **options)


def full(params, apply_fn, **options):
    return static(params, apply_fn, is_full_quantize=True, **options)


def dynamic(params, apply_fn, **options):
    return jaxquant.quant_dynamic(params, apply_fn, IDS, **QUIET, **options)


@pytest.mark.parametrize("quantize", [static, full, dynamic])
def test_one_table_serves_the_lookup_and_the_output_layer(quantize, tmp_path):
    qparams, qapply = quantize(PARAMS, tied)
    stored = qparams["params"]["table"]
    assert {name: x.shape for name, x in stored.items()} == {"int8": (50, 8), "scale": (50,)}
    np.testing.assert_array_equal(stored["scale"], np.abs(PARAMS["table"]).max(1) / np.float32(127))
    found = rows(qapply)
    assert {name: found[name]["mode"] for name in ("table:1", "table")} == {
        "table:1": "int8 weights",
        "table": "int8 (dynamic)" if quantize is dynamic else "int8",
    }
    assert qapply.report().summary["read_dequantized"] == []
    (x, scores), wanted = qapply(qparams, IDS), tied(PARAMS, IDS)
    table = np.float32(stored["int8"]) * np.asarray(stored["scale"])[:, None]
    np.testing.assert_array_equal(x, table[IDS])
    assert np.linalg.norm(scores - wanted[1]) < 0.04 * np.linalg.norm(wanted[1])
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    for a, b in zip(apply_loaded(loaded, IDS), (x, scores), strict=True):
        np.testing.assert_array_equal(a, b)


MODES = {
    "fill": lambda p, ids: jnp.take(p["table"], ids, axis=0) @ p["dense"],
    "clip": lambda p, ids: jnp.take(p["table"], ids, axis=0, mode="clip") @ p["dense"],
    "wrap": lambda p, ids: jnp.take(p["table"], ids, axis=0, mode="wrap") @ p["dense"],
}


@pytest.mark.parametrize("name", MODES)
def test_an_index_out_of_range_gives_what_it_gives_in_float(name):
    qparams, qapply = static(PARAMS, MODES[name])
    assert rows(qapply)["table"]["status"] == "int8"
    for ids in (OUT, OUT - 200, IDS.at[1].set(60)):
        wanted, found = jax.jit(MODES[name])(PARAMS, ids), qapply(qparams, ids)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        close = np.nan_to_num(found - wanted)
        assert np.linalg.norm(close) < 0.04 * np.linalg.norm(np.nan_to_num(wanted)) + 1e-6


def test_float_embeddings():
    """A choice, and the report says so; an output layer that shares the table is another one."""
    alone = lambda p, ids: p["table"][ids] @ p["dense"]  # noqa: E731
    for options in ({"skip": ("table",)}, {"quantizable_op_type": ("mul",)}):
        qparams, qapply = static(PARAMS, alone, **options)
        np.testing.assert_array_equal(qparams["params"]["table"], PARAMS["table"])
        row = rows(qapply)["table"]
        assert (row["kind"], row["status"]) == ("lookup_table", "float")
        assert row["reason"]
    qparams, qapply = static(PARAMS, tied, skip=("kind:lookup_table",))
    assert set(qparams["params"]["table"]) == {"int8", "scale"}
    reason = "skip='kind:lookup_table'; its weight is stored as the integers of another site"
    assert rows(qapply)["table:1"]["reason"] == reason


def test_one_scale_for_the_whole_table():
    qparams, qapply = static(PARAMS, tied, weight_quantize_type="abs_max")
    stored = qparams["params"]["table"]
    assert stored["scale"].shape == ()
    np.testing.assert_array_equal(
        qapply(qparams, IDS)[0], (np.float32(stored["int8"]) * np.asarray(stored["scale"]))[IDS]
    )


@pytest.mark.parametrize("quantize", [static, lambda *a: jaxquant.quant_weights(*a, IDS, **QUIET)])
def test_infinities_in_a_table(quantize):
    """A mask that is looked up, say: it stays float."""
    params = {**PARAMS, "table": PARAMS["table"].at[3, 2].set(-jnp.inf)}
    masked = lambda p, ids: jax.nn.softmax(p["table"][ids]) @ p["dense"]  # noqa: E731
    qparams, qapply = quantize(params, masked)
    assert rows(qapply)["table"]["reason"] == "its table holds infinities, which have no int8 form"
    wanted = masked(params, IDS)
    assert np.linalg.norm(qapply(qparams, IDS) - wanted) < 0.04 * np.linalg.norm(wanted)


def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    qparams, qapply = static(PARAMS, tied)
    jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for ids in (IDS, IDS[:1] - 3):
        found = session.run(None, {session.get_inputs()[0].name: np.asarray(ids)})
        for a, b in zip(found, qapply(qparams, ids), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
