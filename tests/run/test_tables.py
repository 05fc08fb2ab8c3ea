"""Tables of positions, which are sliced or read by known numbers: int8 as other embeddings are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.graph.model import trace_model
from tests import networks
from tests.networks import rows

PARAMS = {
    "words": networks.images(0, (50, 8)),
    "positions": networks.images(1, (12, 8)),
    "deep": networks.images(2, (1, 12, 8)),
    "dense": networks.images(3, (8, 8)),
}
IDS = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
QUIET: Any = {"progress": False}


def adding(table: Callable[[Any, jax.Array], jax.Array]) -> Callable[[Any, jax.Array], jax.Array]:
    """What is added to words before a dot."""
    return lambda p, ids: (p["words"][ids] + table(p, ids)) @ p["dense"]


def started(p: Any, ids: jax.Array) -> jax.Array:
    return lax.dynamic_slice(p["positions"], (ids[0, 0], jnp.int32(0)), (ids.shape[1], 8))


# name: (what is added, the parameter, its rows for IDS)
TABLES = {
    "[:n]": (lambda p, ids: p["positions"][: ids.shape[1]], "positions", range(4)),
    "[None, :n]": (lambda p, ids: p["positions"][None, : ids.shape[1]], "positions", range(4)),
    "[:, 2:n + 2]": (lambda p, ids: p["deep"][:, 2 : ids.shape[1] + 2], "deep", range(2, 6)),
    "[arange(n)]": (lambda p, ids: p["positions"][jnp.arange(ids.shape[1])], "positions",
                    range(4)),
    "dynamic_slice": (started, "positions", range(4)),
}  # fmt: skip


def static(params: Any, apply_fn: Any) -> Any:
    return jaxquant.quant_post(params, apply_fn, [IDS], **QUIET)


def dynamic(params: Any, apply_fn: Any) -> Any:
    return jaxquant.quant_dynamic(params, apply_fn, IDS, **QUIET)


def weights(params: Any, apply_fn: Any) -> Any:
    return jaxquant.quant_weights(params, apply_fn, IDS, **QUIET)


@pytest.mark.parametrize(
    ("name", "quantize"),
    [
        ("[:n]", static),
        ("[:n]", weights),
        ("[None, :n]", dynamic),
        ("[:, 2:n + 2]", static),
        ("[arange(n)]", dynamic),
        ("dynamic_slice", static),
        ("dynamic_slice", weights),
    ],
)
def test_the_table_is_int8_with_a_scale_a_row(name: str, quantize: Any, tmp_path: Any):
    table, path, at = TABLES[name]
    apply_fn = adding(table)
    qparams, qapply = quantize(PARAMS, apply_fn)
    assert rows(qapply)[path]["mode"] == "int8 weights"
    assert rows(qapply)[path]["kind"] == "lookup_table"
    stored = qparams["params"][path]
    given = PARAMS[path].reshape(12, 8)
    scale = np.abs(given).max(axis=1) / np.float32(127)
    np.testing.assert_allclose(np.ravel(stored["scale"]), scale, rtol=1e-6)
    np.testing.assert_array_equal(stored["int8"], np.rint(given / scale[:, None]).astype(np.int8))
    assert set(stored) == {"int8", "scale"}

    # The rows that are added are those of the table, for other lengths too.
    added = lambda p, ids: p["words"][ids] + table(p, ids)  # noqa: E731
    direct, apply_added = jaxquant.quant_dynamic(
        PARAMS, lambda p, ids: (added(p, ids), added(p, ids) @ p["dense"]), IDS, **QUIET
    )
    restored = np.float32(stored["int8"]) * scale[:, None]
    words = direct["params"]["words"]
    words = np.float32(words["int8"]) * np.asarray(words["scale"])[:, None]
    found = apply_added(direct, IDS)[0]
    np.testing.assert_allclose(found, words[IDS] + restored[list(at)], rtol=1e-6, atol=1e-6)
    short = IDS[:2, :2]
    off = qapply(qparams, short) - apply_fn(PARAMS, short)
    assert np.linalg.norm(off) < 0.03 * np.linalg.norm(apply_fn(PARAMS, short))

    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(apply_loaded(loaded, IDS), qapply(qparams, IDS))


def test_a_text_as_long_as_the_table_is_no_other_model():
    """JAX leaves the slice of all rows out."""
    apply_fn = adding(TABLES["[:n]"][0])
    qparams, qapply = static(PARAMS, apply_fn)
    longest = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    for given in ((qparams, qapply), jaxquant.quant_post(PARAMS, apply_fn, [longest], **QUIET)):
        assert given[0]["params"]["positions"].keys() == {"int8", "scale"}
        for ids in (IDS, longest):
            off = given[1](given[0], ids) - apply_fn(PARAMS, ids)
            assert np.linalg.norm(off) < 0.1 * np.linalg.norm(apply_fn(PARAMS, ids))


def test_a_table_of_few_rows_is_not_worth_it():
    """As that of BERT's two types of tokens, of which each text reads one."""
    apply_fn = lambda p, x: x + p["types"][jnp.zeros(4, jnp.int32)]  # noqa: E731
    model = trace_model(apply_fn, {"types": jnp.ones((2, 4))}, (jnp.ones((4, 4)),))
    assert not model.sites


def test_the_bias_of_heads_is_no_table():
    params = {"heads": networks.images(4, (8, 3, 5)), "bias": networks.images(5, (3, 5))}
    apply_fn = lambda p, x: jnp.einsum("btd,dhe->bthe", x, p["heads"]) + p["bias"]  # noqa: E731
    model = trace_model(apply_fn, params, (jnp.ones((2, 4, 8)),))
    assert [site.kind for site in model.sites] == ["mul"]


def test_a_slice_behind_the_end_is_moved_as_in_float():
    qparams, qapply = static(PARAMS, adding(started))
    late = IDS + 10
    off = qapply(qparams, late) - adding(started)(PARAMS, late)
    assert np.linalg.norm(off) < 0.03 * np.linalg.norm(adding(started)(PARAMS, late))


def test_onnx_has_the_rows_as_integers(tmp_path: Any):
    runtime = pytest.importorskip("onnxruntime")
    qparams, qapply = static(PARAMS, adding(TABLES["[:n]"][0]))
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, shapes="batch, n")
    session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
    for ids in (IDS, IDS[:2, :3]):
        (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(ids)})
        np.testing.assert_allclose(found, qapply(qparams, ids), rtol=1e-5, atol=1e-5)
    table = np.asarray(qparams["params"]["positions"]["int8"])
    assert table.tobytes() in (tmp_path / "m.onnx").read_bytes()


OTHERS = {
    "a part of a weight": lambda p, x: x @ p["dense"][:4],
    "a factor": lambda p, x: x * p["positions"][:4, :4] @ p["dense"][:4],
    "some columns": lambda p, x: x + p["positions"][:4, :4],
    "what is given": lambda p, x: (x, p["positions"][:4]),
    "no parameter": lambda p, x: x + jnp.ones((9, 4))[:4],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_slices_stay_as_they_are(name: str):
    model = trace_model(OTHERS[name], PARAMS, (jnp.ones((4, 4)),))
    assert not any(site.is_lookup for site in model.sites)
    assert not any(eqn.name == "gather" for eqn in model.graph.equations)
