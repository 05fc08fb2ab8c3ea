"""What the runtimes make of the exported file: int8 kernels, by their own account."""

import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxquant
from tests.deploy.onnx.runtime import ops, run, session, sqnr
from tests.networks import images, random_params

onnx = pytest.importorskip("onnx")
SHAPE = (4, 16, 16, 8)


class Residual(nn.Module):
    """Four convolutions: two whose result is quantized, one before a pool; two meet in float."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu6(nn.Conv(32, (3, 3), name="stem")(x)), (2, 2), (2, 2))
        y = nn.relu(nn.Conv(32, (3, 3), (2, 1), feature_group_count=32, name="depthwise")(x))
        y = nn.Conv(32, (1, 1), name="project")(y)
        y = nn.relu(y + nn.Conv(32, (1, 1), (2, 1), name="shortcut")(x))
        return nn.Dense(10, name="head")(y.mean((1, 2)))


@pytest.fixture(scope="module")
def model():
    apply_fn, batch = Residual().apply, images(0, SHAPE)
    params = random_params(lambda: Residual().init(jax.random.key(0), batch))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [batch], algo="abs_max", progress=False)
    x = images(1, (3, *SHAPE[1:]))
    return qparams, qapply, x, np.asarray(qapply(qparams, x))


@pytest.mark.parametrize("runtime", ["any", "onnxruntime"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_both_forms_agree_with_qapply(model, runtime, channels_first, tmp_path):
    qparams, qapply, x, expected = model
    path = tmp_path / "m.onnx"
    options = {"runtime": runtime, "channels_first": channels_first}
    jaxquant.export_onnx(path, qparams, qapply, **options)
    given = np.asarray(x).transpose(0, 3, 1, 2) if channels_first else x
    assert sqnr(expected, run(path, given)[0]) > 40


class Deep(nn.Module):
    """Twelve inverted residuals: an integer that is one off at the start is many at the end."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="stem")(x))
        for n in range(12):
            y = nn.relu6(nn.Conv(96, (1, 1), name=f"expand{n}")(x))
            y = nn.relu6(nn.Conv(96, (3, 3), feature_group_count=96, name=f"depthwise{n}")(y))
            x = x + nn.Conv(32, (1, 1), name=f"project{n}")(y)
        return nn.Conv(10, (1, 1), name="head")(x)


def test_deep_networks_come_to_the_same_integers(tmp_path):
    """Nothing but the last multiplication differs, in its last bits."""
    apply_fn, batch = Deep().apply, images(0, (8, 16, 16, 3))
    params = random_params(lambda: Deep().init(jax.random.key(0), batch))
    qparams, qapply = jaxquant.quant_post(params, apply_fn, [batch], progress=False)
    x = images(1, (32, 16, 16, 3))
    expected = np.asarray(qapply(qparams, x))
    assert sqnr(expected, np.asarray(qapply.with_backend("xla")(qparams, x))) > 120
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, runtime="onnxruntime")
    assert sqnr(expected, run(tmp_path / "m.onnx", x)[0]) > 120


def test_every_convolution_is_int8_in_onnx_runtime(model, tmp_path):
    qparams, qapply, _, _ = model
    path, optimized = tmp_path / "m.onnx", tmp_path / "optimized.onnx"
    jaxquant.export_onnx(path, qparams, qapply, channels_first=True, runtime="onnxruntime")
    session(path, optimized_model_filepath=str(optimized))
    found = ops(onnx.load(optimized))
    assert found.count("QLinearConv") == 2
    assert found.count("MatMulInteger") == 2
    assert found.count("QGemm") == 1
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(found)


# OpenVINO forks a process on import, of which JAX warns.
@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_every_convolution_is_int8_in_openvino(model, tmp_path):
    openvino = pytest.importorskip("openvino")
    qparams, qapply, x, expected = model
    path = tmp_path / "m.onnx"
    jaxquant.export_onnx(path, qparams, qapply, channels_first=True, processors="vnni")
    settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    (found,) = request.infer([np.asarray(x).transpose(0, 3, 1, 2).copy()]).values()
    kinds = ("Convolution", "GroupConvolution")
    kernels = [p.exec_type for p in request.profiling_info if p.node_type in kinds]
    assert len(kernels) == 4
    assert all(kernel.lower().endswith("i8") for kernel in kernels), kernels
    assert sqnr(expected, found) > 35


@pytest.mark.parametrize("processors", ["any", "gpu"])
def test_weights_are_8_bits_with_a_scale_for_each_channel_and_biases_int32(
    processors, model, tmp_path
):
    qparams, qapply, _, _ = model
    jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, processors=processors)
    graph = onnx.load(tmp_path / "m.onnx").graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    producers = {node.output[0]: node for node in graph.node}
    convolutions = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(convolutions) == 5
    for node in convolutions:
        _, weight, bias = (producers[name] for name in node.input)
        is_depthwise = arrays[weight.input[0]].shape[1] == 1
        is_int8 = processors == "gpu" or is_depthwise
        assert arrays[weight.input[0]].dtype == (np.int8 if is_int8 else np.uint8)
        assert (arrays[weight.input[2]] == (0 if is_int8 else 128)).all()
        assert arrays[weight.input[1]].size in arrays[weight.input[0]].shape
        assert arrays[bias.input[0]].dtype == np.int32


def test_an_unknown_runtime_is_an_error(model, tmp_path):
    with pytest.raises(ValueError, match="runtime='tensorrt': one of 'any', 'onnxruntime'"):
        jaxquant.export_onnx(tmp_path / "m.onnx", *model[:2], runtime="tensorrt")


def test_the_mobile_format_gives_the_same_bits(model, tmp_path):
    qparams, qapply, x, _ = model
    path = tmp_path / "m.onnx"
    jaxquant.export_onnx(path, qparams, qapply, runtime="onnxruntime")
    tool = "onnxruntime.tools.convert_onnx_models_to_ort"
    command = [sys.executable, "-m", tool, str(path), "--optimization_style", "Fixed"]
    subprocess.run(command, check=True, capture_output=True)
    assert run(path, x)[0].tobytes() == run(path.with_suffix(".ort"), x)[0].tobytes()
