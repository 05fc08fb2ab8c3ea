"""What an exported file says of itself, and what export_litert refuses."""

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests.deploy.litert.runtime import interpreter, litert, ops, run, sqnr
from tests.deploy.litert.test_contraction import weights
from tests.networks import images, quantize

tflite = pytest.importorskip("tflite")


def two_inputs(p, x):
    return {"a/b": nn.relu(x["left"] @ p["w"]) @ p["v"], "c": x["right"] * 2.0}


@pytest.fixture(scope="module")
def model():
    p = {"w": weights(8, 8), "v": weights(8, 3)}
    x = {"left": images(0, (4, 6, 8)), "right": images(1, (4, 2))}
    return *quantize(p, two_inputs, x), x


def test_the_signature_names_inputs_and_outputs(model, tmp_path):
    qparams, qapply, x = model
    jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    active = litert.Interpreter(str(tmp_path / "m.tflite"))
    assert active.get_signature_list() == {
        "serving_default": {
            "inputs": ["input/left", "input/right"],
            "outputs": ["output/a/b", "output/c"],
        }
    }
    found = active.get_signature_runner()(
        **{"input/left": np.asarray(x["left"][:1]), "input/right": np.asarray(x["right"][:1])}
    )
    expected = qapply(qparams, jax.tree.map(lambda a: a[:1], x))
    for name in ("a/b", "c"):
        assert sqnr(expected[name], found[f"output/{name}"]) > 100


def test_the_batch_varies_and_has_its_name(model, tmp_path):
    qparams, qapply, _ = model
    jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    (given, *_) = interpreter(tmp_path / "m.tflite").get_input_details()
    assert given["shape_signature"].tolist() == [-1, 6, 8]
    file = tflite.Model.GetRootAs((tmp_path / "m.tflite").read_bytes())
    notes = {file.Metadata(k).Name(): file.Metadata(k) for k in range(file.MetadataLength())}
    note = json.loads(file.Buffers(notes[b"jaxquant"].Buffer()).DataAsNumpy().tobytes())
    assert note["sizes"]["input/left"] == ["batch", 6, 8]
    assert note["in_float"] == ["v"]  # whose result nobody quantizes


def test_channels_last(tmp_path):
    p, x = {"w": weights(6, 3, 3, 3)}, images(0, (4, 3, 8, 8))
    qparams, qapply = quantize(p, lambda p, x: jax.lax.conv(x, p["w"], (1, 1), "SAME"), x)
    path = tmp_path / "m.tflite"
    jaxquant.export_litert(path, qparams, qapply, channels_last=True, progress=False)
    (found,) = run(path, x.transpose(0, 2, 3, 1))
    assert sqnr(np.asarray(qapply(qparams, x)).transpose(0, 2, 3, 1), found) > 100


def test_a_fixed_size_is_in_the_file(model, tmp_path):
    qparams, qapply, _ = model
    path = tmp_path / "m.tflite"
    jaxquant.export_litert(
        path, qparams, qapply, shapes=({"left": "2, 6, 8", "right": "2, 2"},), progress=False
    )
    (given, *_) = interpreter(path).get_input_details()
    assert given["shape"].tolist() == [2, 6, 8]


def in_parts(p, x):
    flat = jnp.concatenate([(x @ p["w"]).ravel(), jnp.ones(3)])
    y, rest = jax.lax.split(flat, (x.shape[0] * 8, 3))
    return y * rest.sum()


def derivative(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["w"]))(x)


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (lambda p, x: jnp.sort(x @ p["w"]), r"does not cover the operation 'sort'.*site 'w'"),
        (derivative, "does not cover copies along an axis whose size varies"),
        (in_parts, "does not cover a split into sizes that vary"),
    ],
)
def test_what_is_not_covered_is_named(apply_fn, message, tmp_path):
    p, x = {"w": weights(8, 8)}, images(0, (4, 8))
    qparams, qapply = quantize(p, apply_fn, x)
    with pytest.raises(ValueError, match=message):
        jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    assert not list(tmp_path.iterdir())


def test_what_is_scaled_in_the_call(tmp_path):
    """The runtime finds scales of its own, much like those of qapply."""
    p = {"k": weights(3, 3, 3, 8), "w": weights(8, 16), "v": weights(16, 5)}

    def apply_fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=numbers)
        return nn.gelu(nn.relu(y) @ p["w"]) @ p["v"]

    x = images(0, (4, 8, 8, 3))
    qparams, qapply = jaxquant.quant_dynamic(p, apply_fn, x)
    jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    (found,) = run(tmp_path / "m.tflite", x)
    assert sqnr(qapply(qparams, x), found) > 35
    assert "DEQUANTIZE" not in ops(tmp_path / "m.tflite")


def test_weights_alone(tmp_path):
    p = {"w": weights(8, 8), "k": weights(3, 8, 8), "table": weights(5, 8)}

    def apply_fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        )
        return jnp.tanh(y @ p["w"]) @ p["table"].T

    x = images(0, (4, 6, 8))
    qparams, qapply = jaxquant.quant_weights(p, apply_fn, x)
    jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    (found,) = run(tmp_path / "m.tflite", x)
    assert sqnr(qapply(qparams, x), found) > 100
    assert (tmp_path / "m.tflite").stat().st_size < 6000

    qparams, qapply = jaxquant.quant_weights(p, apply_fn, x, weight_bits=4)
    with pytest.raises(ValueError, match=r"a weight of 4 bits \(LiteRT has int8 weights"):
        jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)


def test_a_missing_package_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tflite", None)
    with pytest.raises(ImportError, match=r"export_litert needs tflite: pip install .*\[litert\]"):
        jaxquant.export_litert(tmp_path / "m.tflite", *model[:2], progress=False)
