"""The forms of weights: exact on every processor, or int8 where that is exact."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import sqnr
from tests.other_processors import HIDDEN, run_python

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

C = 32  # channels


def conv(rank, groups=1, **options):
    """A convolution of the channels of x, [B, H, W, C], along as many axes."""
    letters = "DHW"[-rank:]
    numbers = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def apply(w, x):
        if rank == 1:
            x = x[:, 0]
        elif rank == 3:
            x = jnp.concatenate([x[:, None]] * 2, 1)
        strides = options.get("strides", (1,) * rank)
        more = {k: v for k, v in options.items() if k != "strides"}
        y = lax.conv_general_dilated(
            x, w, strides, more.pop("padding", "SAME"), dimension_numbers=numbers,
            feature_group_count=groups, **more,
        )  # fmt: skip
        return y.mean(tuple(range(1, 1 + rank))) if rank != 2 else y

    return apply


FORMS = {  # the shape of the weight, and what is done with it
    "convolution": ((3, 3, C, 16), conv(2)),
    "strided": ((3, 3, C, 16), conv(2, strides=(2, 2))),
    "dilated": ((3, 3, C, 16), conv(2, rhs_dilation=(2, 2))),
    "pointwise": ((1, 1, C, 16), conv(2)),
    "grouped": ((3, 3, C // 2, 16), conv(2, 2)),
    "depthwise": ((3, 3, 1, C), conv(2, C)),
    "depthwise, two each": ((3, 3, 1, 2 * C), conv(2, C)),
    "one axis": ((3, C, 16), conv(1)),
    "three axes": ((2, 2, 2, C, 16), conv(3)),
    "transposed": ((2, 2, C, 16), conv(2, lhs_dilation=(2, 2), padding=((1, 1), (1, 1)))),
    "dense": ((C, 16), lambda w, x: x[:, 0, 0] @ w),
    "dense on axes": ((C, 16), lambda w, x: x @ w),
    "weight first": ((C, 16), lambda w, x: jnp.einsum("co,bhwc->obhw", w, x)),
    "a weight for each row": ((6, C, 16), lambda w, x: jnp.einsum("hco,bhwc->bhwo", w, x)),
    "two activations": ((C, C), lambda w, x: jnp.einsum("bhwc,bhvc->bhwv", x, x @ w)),
    "an activation by itself": ((C, C), lambda w, x: jnp.einsum("bhwc,bhvc->bhwv", x, x)),
}
X = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1, (4, 6, 6, C)), jnp.float32)


def large(shape, seed):
    """Weights of one sign for each output channel, so that sums of two products are large."""
    rng = np.random.default_rng(seed)
    signs = np.where(np.arange(shape[-1]) % 2, -1, 1)
    return jnp.asarray(rng.uniform(0.6, 1, shape) * signs, jnp.float32)


def every_form(params, x):
    """Each form twice: its result as an output, and quantized again for another dot."""
    outputs = {}
    for name, (_, function) in FORMS.items():
        outputs[name] = function(params[name], x)
        y = jax.nn.relu(function(params[name], x))
        outputs[f"{name}, then a dot"] = y @ params["last"][: y.shape[-1]]
    return outputs


@pytest.fixture(scope="module")
def model():
    params = {name: large(shape, k) for k, (name, (shape, _)) in enumerate(FORMS.items())}
    params["last"] = large((2 * C, 8), 99)
    return jaxquant.quant_post(
        params, every_form, [X], algo="abs_max", is_full_quantize=True, progress=False
    )


TARGETS = {
    f"{runtime}, {processors}": {"runtime": runtime, "processors": processors}
    for runtime in ("any", "onnxruntime")
    for processors in ("any", "vnni")
}
_ONNX_RUNTIME = """
import sys
import numpy as np
import onnxruntime

folder, *files = sys.argv[1:]
for precision in "01":
    for file in files:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        options.add_session_config_entry("session.x64quantprecision", precision)
        session = onnxruntime.InferenceSession(
            f"{folder}/{file}.onnx", options, providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {session.get_inputs()[0].name: np.load(f"{folder}/x.npy")})
        np.savez(f"{folder}/{file}/{precision}.npz", *found)
"""
_OPENVINO = """
import sys
import numpy as np
import openvino

folder, *files = sys.argv[1:]
# Without the second setting it quantizes the activations of dots on its own account.
settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
for file in files:
    compiled = openvino.Core().compile_model(f"{folder}/{file}.onnx", "CPU", settings)
    found = compiled.create_infer_request().infer([np.load(f"{folder}/x.npy")])
    np.savez(f"{folder}/{file}/openvino.npz", *[found[output] for output in compiled.outputs])
"""


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """A folder with the model for each of `TARGETS`."""
    folder = tmp_path_factory.mktemp("exported")
    for name, target in TARGETS.items():
        jaxquant.export_onnx(folder / f"{name}.onnx", *model, **target)
        (folder / name).mkdir()
    np.save(folder / "x.npy", X[:2])
    return folder


def least_sqnr(model, path):
    """The name of the output that differs most from qapply's, and the SQNR of it, in dB."""
    expected = jax.tree.leaves(model[1](model[0], X[:2]))
    found = np.load(path)
    ratios = [sqnr(a, found[f"arr_{k}"]) for k, a in enumerate(expected)]
    names = sorted([*FORMS, *(f"{name}, then a dot" for name in FORMS)])  # as a dict is flattened
    worst = int(np.argmin(ratios))
    return names[worst], ratios[worst]


@pytest.mark.parametrize("processor", HIDDEN)
def test_onnx_runtime_is_exact_on_every_processor(processor, model, exported):
    run_python(processor, exported, _ONNX_RUNTIME, exported, *TARGETS)
    for name, target in TARGETS.items():
        worst, ratio = least_sqnr(model, exported / name / "0.npz")
        if target["processors"] == "any" or processor == "this":
            assert ratio > 55, (name, worst)
        else:
            assert ratio < 20  # or the processor was none without VNNI
        # Its own session option makes int8 weights exact too, and has to load every form.
        worst, ratio = least_sqnr(model, exported / name / "1.npz")
        assert ratio > 55, (name, worst)


@pytest.mark.parametrize("processor", HIDDEN)
def test_openvino_is_exact_on_every_processor(processor, model, exported):
    if importlib.util.find_spec("openvino") is None:  # not imported here: it forks, JAX warns of it
        pytest.skip("openvino is not installed")
    run_python(processor, exported, _OPENVINO, exported, "any, any", "any, vnni")
    worst, ratio = least_sqnr(model, exported / "any, any" / "openvino.npz")
    assert ratio > 55, worst
    if processor != "this":
        assert least_sqnr(model, exported / "any, vnni" / "openvino.npz")[1] < 20


def stored(path):
    """The types of the constants that are dequantized with scales for channels, or convolved."""
    graph = onnx.load(path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    reads = [n for n in graph.node if n.op_type in ("DequantizeLinear", "ConvTranspose")]
    weights = [arrays[name] for n in reads for name in n.input[:2] if name in arrays]
    return {str(w.dtype) for w in weights if w.ndim > 1}


def test_weights_are_of_the_types_that_the_processors_sum_exactly(exported):
    assert stored(exported / "any, any.onnx") == {"uint8", "int8", "float32"}
    assert stored(exported / "any, vnni.onnx") == {"int8"}


def test_a_processor_that_is_none_is_an_error(model, tmp_path):
    with pytest.raises(ValueError, match="processors='avx2': one of 'any', 'vnni', 'arm', 'gpu'"):
        jaxquant.export_onnx(tmp_path / "m.onnx", *model, processors="avx2")
    assert not list(tmp_path.iterdir())
