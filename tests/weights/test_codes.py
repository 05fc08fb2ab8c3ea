"""NF4 and MXFP4 against NumPy: every code, ties, scales; and a model with such weights."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from jaxquant.code_tables import VALUES
from jaxquant.plan.config import QuantConfig
from jaxquant.weights.codes import encode
from tests import networks
from tests.networks import rows

QUIET: Any = {"progress": False}
PARAMS = {
    "table": networks.images(0, (50, 40)),
    "a": networks.images(1, (40, 72)),
    "b": networks.images(2, (72, 9)),
}
IDS = np.arange(12, dtype=np.int32).reshape(3, 4)


def apply_fn(p: Any, ids: jax.Array) -> jax.Array:
    return jnp.tanh(p["table"][ids] @ p["a"]) @ p["b"]


def quantized_nf4(group: np.ndarray) -> np.ndarray:
    """The nearest of the values times the largest |w|, in bfloat16."""
    values = VALUES["nf4"].astype(np.float64) * float(jnp.bfloat16(np.abs(group).max()))
    return values[np.abs(group[:, None] - values).argmin(axis=1)]


def quantized_mxfp4(group: np.ndarray) -> np.ndarray:
    """As the specification says it: a shared exponent, E2M1 rounded half to even, clipped."""
    largest = np.abs(group).max()
    shared = 2.0 ** (np.floor(np.log2(largest)) - 2) if largest else 1.0
    scaled = np.abs(group) / shared
    exponent = np.clip(np.floor(np.log2(np.maximum(scaled, 1e-30))), 0, 2)
    step = 2.0 ** (exponent - 1)
    return np.copysign(np.minimum(np.rint(scaled / step) * step, 6.0), group) * shared


REFERENCES = {"nf4": quantized_nf4, "mxfp4": quantized_mxfp4}


def dequantized(name: str, groups: np.ndarray) -> np.ndarray:
    codes, scale = encode(groups, name, np.dtype(jnp.bfloat16))
    unit = scale.astype(np.float64)
    unit = 2.0 ** (unit - 127) if name == "mxfp4" else unit
    return VALUES[name].astype(np.float64)[codes] * unit[..., None]


@pytest.mark.parametrize("name", REFERENCES)
def test_groups_are_those_of_numpy(name: str):
    rng = np.random.default_rng(0)
    groups = rng.normal(size=(40, 32)) * 2.0 ** rng.integers(-20, 20, (40, 1))
    wanted = np.stack([REFERENCES[name](group) for group in groups])
    np.testing.assert_allclose(dequantized(name, groups), wanted, rtol=1e-12)


def test_ties_of_mxfp4_go_to_the_even_code():
    ties = np.array([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 4.0]])
    assert dequantized("mxfp4", ties).tolist() == [[0, 1, 1, 2, 2, 4, 4, 0, -4, 4]]


@pytest.mark.parametrize("name", REFERENCES)
def test_a_value_of_the_table_stays_as_it_is(name: str):
    """Also times a power of two; zero has no scale."""
    values = VALUES[name].astype(np.float64)
    for unit in (1.0, 2.0**-30, 2.0**30):
        np.testing.assert_array_equal(dequantized(name, values[None] * unit), values[None] * unit)
    assert not dequantized(name, np.zeros((1, 8))).any()


@pytest.mark.parametrize("name", REFERENCES)
def test_a_model_computes_with_the_values(name: str, tmp_path: Any):
    """An embedding and two dots, one with K that no group divides, in a saved model too."""
    options: Any = {"group_size": 32} if name == "nf4" else {}
    qparams, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, weight_dtype=name, **options,
                                             rules=[jaxquant.Rule("b", weight_bits=4)],
                                             **QUIET)  # fmt: skip
    assert {row["mode"] for row in rows(qapply).values()} == {f"{name} weights"}
    assert qparams["params"]["a"][name].shape == (20, 72)
    scale = qparams["params"]["a"]["scale"]
    assert (scale.shape, scale.dtype) == ((2, 72), np.uint8 if name == "mxfp4" else jnp.bfloat16)

    def in_groups(weight: np.ndarray, axis: int) -> np.ndarray:
        lines = np.moveaxis(np.float64(weight), axis, -1)
        found = np.empty_like(lines)
        for place in np.ndindex(lines.shape[:-1]):
            for first in range(0, lines.shape[-1], 32):
                part = lines[place][first : first + 32]
                found[place][first : first + 32] = REFERENCES[name](part)
        return np.moveaxis(found, -1, axis).astype(np.float32)

    wanted = {"table": in_groups(PARAMS["table"], 1)}
    wanted |= {part: in_groups(PARAMS[part], 0) for part in ("a", "b")}
    found = jax.jit(qapply)(qparams, IDS)
    np.testing.assert_allclose(found, apply_fn(wanted, IDS), rtol=2e-5, atol=2e-5)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(jax.jit(apply_loaded)(loaded, IDS), found)


@pytest.mark.parametrize("name", REFERENCES)
def test_data_round_the_codes(name: str):
    """What a site gives on the data is nearer than with each weight rounded to nearest."""
    ids = np.random.default_rng(0).integers(0, 50, (64, 4)).astype(np.int32)

    def off(**options: Any) -> float:
        qparams, qapply = jaxquant.quant_weights(
            PARAMS, dot, ids, weight_dtype=name, group_size=32, skip=("table",), **options, **QUIET
        )
        return float(np.linalg.norm(qapply(qparams, ids) - dot(PARAMS, ids)))

    def dot(p: Any, ids: jax.Array) -> jax.Array:
        x = p["table"][ids]
        return (x + 4 * x.mean(axis=-1, keepdims=True)) @ p["a"]

    assert off() < 0.8 * off(recover=())


@pytest.mark.parametrize("name", REFERENCES)
def test_layers_of_a_scan_and_a_tied_layer(name: str):
    params = {"w": networks.images(3, (2, 32, 32)), "table": networks.images(4, (50, 32))}

    def tied(p: Any, ids: jax.Array) -> jax.Array:
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), p["table"][ids], p["w"])[0]
        return x @ p["table"].T

    qparams, qapply = jaxquant.quant_weights(
        params, tied, IDS, weight_dtype=name, group_size=32, **QUIET
    )
    plain = jax.tree.map(np.zeros_like, params)
    for layer, column in itertools.product(range(2), range(32)):
        plain["w"][layer, :, column] = REFERENCES[name](np.float64(params["w"][layer, :, column]))
    for row in range(50):
        plain["table"][row] = REFERENCES[name](np.float64(params["table"][row]))
    np.testing.assert_allclose(qapply(qparams, IDS), tied(plain, IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_dtype": "fp4"}, r"weight_dtype: 'fp4' is not known; nearest: mxfp4, nf4"),
        ({"weight_dtype": "mxfp4", "group_size": 64}, r"has a scale for 32 weights, got group_siz"),
        ({"weight_dtype": "nf4", "recover": ("awq", "gptq")}, r"recover: 'awq' is for integers"),
        ({"weight_dtype": "nf4", "rules": [jaxquant.Rule("a", recover=("awq",))]}, r"'awq' is for"),
    ],
)
def test_what_does_not_go_together_is_an_error(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        jaxquant.quant_weights(PARAMS, apply_fn, IDS, **options, **QUIET)
    with pytest.raises(ValueError, match=r"weight_dtype='nf4' is of jaxquant.quant_weights"):
        QuantConfig(weight_dtype="nf4")


@pytest.mark.parametrize("export", [jaxquant.export_onnx, jaxquant.export_litert])
def test_exporters_refuse_codes(export: Any, tmp_path: Any):
    pytest.importorskip("onnx" if export is jaxquant.export_onnx else "flatbuffers")
    qparams, qapply = jaxquant.quant_weights(PARAMS, apply_fn, IDS, weight_dtype="mxfp4", **QUIET)
    with pytest.raises(ValueError, match=r"no exporter writes 'mxfp4' weights, as of table"):
        export(tmp_path / "model", qparams, qapply)
