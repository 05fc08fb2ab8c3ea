"""Models that are quantized for LiteRT: the file computes what qapply does, bit for bit."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxquant
from tests.deploy.litert.runtime import ops, run, sqnr
from tests.networks import images, random_params

SHAPE = (4, 12, 12, 3)


class Residual(nn.Module):
    """Inverted residuals and a shortcut, whose sums meet in additions."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        for n in range(3):
            y = nn.relu6(nn.Conv(24, (1, 1), name=f"expand{n}")(x))
            y = nn.relu6(nn.Conv(24, (3, 3), feature_group_count=24, name=f"depthwise{n}")(y))
            x = x + nn.Conv(8, (1, 1), name=f"project{n}")(y)
        y = nn.Conv(16, (1, 1), (2, 2), name="shortcut")(x)
        x = nn.relu(y + nn.Conv(16, (3, 3), (2, 2), name="strided")(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def model():
    batch, net = images(0, SHAPE), Residual()
    params = random_params(lambda: net.init(jax.random.key(0), batch))

    @functools.cache
    def quantized(**config):
        return jaxquant.quant_post(
            params, net.apply, [batch], algo="abs_max", recover=(), progress=False, **config
        )

    return quantized, net.apply, params


def test_residual_networks_are_int8_throughout_and_exact(model, tmp_path):
    quantized, apply_fn, params = model
    qparams, qapply = quantized(is_full_quantize=True, target="litert")
    path, x = tmp_path / "m.tflite", images(1, (16, *SHAPE[1:]))
    jaxquant.export_litert(path, qparams, qapply, progress=False)
    found = ops(path)
    assert found.count("ADD") == 4
    assert (found.count("QUANTIZE"), found.count("DEQUANTIZE")) == (1, 1)
    expected = np.asarray(qapply(qparams, x))
    np.testing.assert_array_equal(run(path, x)[0], expected)
    assert sqnr(apply_fn(params, x), expected) > 25


def test_average_pools_are_int8_and_exact(tmp_path):
    def average(y, window, strides, padding="VALID"):
        sizes, strides = (1, *window, 1), (1, *strides, 1)
        total = jax.lax.reduce_window(y, 0.0, jax.lax.add, sizes, strides, padding)
        return total / float(np.prod(window))

    def apply_fn(p, x):
        y = average(nn.relu(x @ p["first"]), (2, 2), (2, 2))
        y = average(nn.relu(y @ p["middle"]), (3, 3), (1, 1), "SAME")
        return average(y @ p["middle"], (2, 3), (2, 1))

    params = {"first": images(2, (3, 8)) * 0.4, "middle": images(3, (8, 8)) * 0.4}
    qparams, qapply = jaxquant.quant_post(
        params,
        apply_fn,
        [images(0, SHAPE)],
        is_full_quantize=True,
        target="litert",
        progress=False,
    )
    path, x = tmp_path / "m.tflite", images(1, (16, *SHAPE[1:]))
    jaxquant.export_litert(path, qparams, qapply, progress=False)
    found = ops(path)
    assert (found.count("QUANTIZE"), found.count("DEQUANTIZE")) == (1, 1)
    np.testing.assert_array_equal(run(path, x)[0], np.asarray(qapply(qparams, x)))


def test_additions_in_float_between_int8_convolutions(model, tmp_path):
    qparams, qapply = model[0](target="litert")
    path, x = tmp_path / "m.tflite", images(1, SHAPE)
    jaxquant.export_litert(path, qparams, qapply, progress=False)
    jaxquant.save_quantized_model(tmp_path / "m.safetensors", qparams, qapply, progress=False)
    loaded = jaxquant.load_quantized_model(tmp_path / "m.safetensors")
    expected = np.asarray(qapply(qparams, x))
    assert sqnr(expected, run(path, x)[0]) > 100
    np.testing.assert_array_equal(np.asarray(loaded[1](loaded[0], x)), expected)
    # The output is on its grid for everybody.
    (grid,) = (tensor for tensor in qapply.plan.tensors if tensor.name == "head/output")
    steps = expected.astype(np.float64) / grid.scale
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)


def test_the_layers_of_a_scan_are_rounded_too(tmp_path):
    p = {"w": images(1, (3, 8, 8)) * 0.4, "head": images(3, (8, 5))}

    def apply_fn(p, x):
        y, _ = jax.lax.scan(lambda c, w: (c + nn.relu(c @ w), None), x, p["w"])
        return y @ p["head"]

    x = images(0, (16, 8))
    options = {"is_full_quantize": True, "target": "litert", "recover": (), "progress": False}
    qparams, qapply = jaxquant.quant_post(p, apply_fn, [x], **options)
    jaxquant.export_litert(tmp_path / "m.tflite", qparams, qapply, progress=False)
    assert ops(tmp_path / "m.tflite").count("ADD") == 3
    assert ops(tmp_path / "m.tflite").count("QUANTIZE") == 1
    np.testing.assert_array_equal(run(tmp_path / "m.tflite", x)[0], qapply(qparams, x))


def test_onnx_has_the_same_grids(model, tmp_path):
    pytest.importorskip("onnxruntime")
    from tests.deploy.onnx.runtime import run as run_onnx

    qparams, qapply = model[0](is_full_quantize=True, target="litert")
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, progress=False)
    x = images(1, SHAPE)
    assert sqnr(qapply(qparams, x), run_onnx(tmp_path / "m.onnx", x)[0]) > 100
