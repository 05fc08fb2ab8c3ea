"""A weight that is read in float beside its int8 site is stored once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests import networks

PARAMS = {
    "kernel": networks.images(0, (3, 3, 8, 12)),
    "style": networks.images(1, (8, 8)),
    "table": networks.images(2, (50, 8)),
    "dense": networks.images(3, (8, 8)),
}
IMAGES, ROWS = networks.images(4, (4, 6, 6, 8)), networks.images(5, (16, 8))
IDS = jnp.arange(12).reshape(3, 4)


def modulated(p, x):
    """StyleGAN2: the gain makes the kernel, and its squares make the demodulation."""
    kernel, style = p["kernel"] * 0.1, jnp.mean(x, axis=(1, 2)) @ p["style"] + 1
    scaled = jnp.square(kernel[None] * style[:, None, None, :, None])
    demodulation = lax.rsqrt(jnp.sum(scaled, axis=(1, 2, 3)) + 1e-8)
    y = lax.conv_general_dilated(
        x * style[:, None, None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y * demodulation[:, None, None]


# name: (function, its parameters, its input, those that are read in float)
MODELS = {
    "demodulation": (modulated, ("kernel", "style"), IMAGES, ["kernel"]),
    "gain": (
        lambda p, x: (jnp.tanh(x @ (p["dense"].T / 4)), jnp.sum(jnp.square(p["dense"]), axis=0)),
        ("dense",), ROWS, ["dense"],
    ),
    "tied": (
        lambda p, ids: jnp.tanh(p["table"][ids] @ p["dense"]) @ p["table"].T,
        ("table", "dense"), IDS, [],
    ),
    "penalty": (
        lambda p, x: (jnp.tanh(x @ p["dense"]), jnp.sum(jnp.square(p["dense"].reshape(-1)))),
        ("dense",), ROWS, ["dense"],
    ),
    "both ways": (
        lambda p, x: jnp.tanh(x @ p["dense"]) @ p["dense"].T, ("dense",), ROWS, [],
    ),
    "normalized": (
        lambda p, x: x @ (p["dense"] / jnp.linalg.norm(p["dense"], axis=0)), ("dense",), ROWS, [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_it_shrinks_and_stays_close(name, mode):
    fn, names, x, read = MODELS[name]
    params = {name: PARAMS[name] for name in names}
    if mode == "static":
        qparams, qapply = jaxquant.quant_post(params, fn, [x], progress=False)
    else:
        qparams, qapply = jaxquant.quant_dynamic(params, fn, x)
    assert "float" not in {str(path[-1].key) for path, _ in jax.tree.leaves_with_path(qparams)}
    assert sum(v.nbytes for v in jax.tree.leaves(qparams["params"])) < 0.8 * sum(
        v.nbytes for v in params.values()
    )
    assert qapply.report().summary["read_dequantized"] == read
    wanted, found = jax.tree.leaves(jax.jit(fn)(params, x)), jax.tree.leaves(qapply(qparams, x))
    for a, b in zip(wanted, found, strict=True):
        assert np.linalg.norm(a - b) < 0.04 * np.linalg.norm(a)


def test_what_is_read_is_the_integers_times_their_scales(tmp_path):
    fn, _, x, _ = MODELS["penalty"]
    params = {"dense": PARAMS["dense"]}
    qparams, qapply = jaxquant.quant_post(params, fn, [x], progress=False)
    int8, scale = (np.asarray(qparams["params"]["dense"][k], np.float64) for k in ("int8", "scale"))
    np.testing.assert_allclose(qapply(qparams, x)[1], np.sum((int8 * scale) ** 2), rtol=1e-6)
    jaxquant.save_quantized_model(tmp_path / "model", qparams, qapply)
    loaded, apply_loaded = jaxquant.load_quantized_model(tmp_path / "model")
    np.testing.assert_array_equal(apply_loaded(loaded, x)[1], qapply(qparams, x)[1])


def test_onnx_reads_the_integers_too(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    fn, _, x, _ = MODELS["penalty"]
    qparams, qapply = jaxquant.quant_post({"dense": PARAMS["dense"]}, fn, [x], progress=False)
    jaxquant.export_onnx(tmp_path / "model.onnx", qparams, qapply)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_allclose(found[1], qapply(qparams, x)[1], rtol=1e-5)


def test_weights_alone_are_read_so_as_well():
    fn, _, x, _ = MODELS["penalty"]
    qparams, qapply = jaxquant.quant_weights({"dense": PARAMS["dense"]}, fn, x, weight_bits=4)
    assert set(qparams["params"]["dense"]) == {"int4", "scale"}
    wanted = np.asarray(fn(PARAMS, x)[1])
    assert abs(qapply(qparams, x)[1] - wanted) < 0.05 * wanted


def test_a_float_site_that_shares_its_weight_says_so():
    fn = MODELS["both ways"][0]

    def twice(p, x):
        return jnp.tanh(x @ p["dense"]) @ p["dense"]

    for model in (fn, twice):
        qparams, qapply = jaxquant.quant_dynamic(
            {"dense": PARAMS["dense"]}, model, ROWS, skip=("dense:1",)
        )
        assert set(qparams["params"]["dense"]) == {"int8", "scale"}
        reason = {row["name"]: row["reason"] for row in qapply.report().rows}["dense:1"]
        assert reason == "skip='dense:1'; its weight is stored as the integers of another site"


def test_what_does_not_follow_from_the_integers_is_kept_in_float():
    def standardized(p, x):
        return (
            x @ ((p["dense"] - jnp.mean(p["dense"], axis=0)) / jnp.std(p["dense"], axis=0)),
            jnp.sum(jnp.square(p["dense"])),
        )

    params = {"dense": PARAMS["dense"]}
    qparams, qapply = jaxquant.quant_dynamic(params, standardized, ROWS)
    assert "float" in qparams["params"]["dense"]
    assert qapply.report().summary["read_dequantized"] == []
    np.testing.assert_allclose(qapply(qparams, ROWS)[1], standardized(params, ROWS)[1], rtol=1e-6)
