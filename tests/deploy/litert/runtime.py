"""Export and run in LiteRT; compare with qapply."""

import jax
import numpy as np
import pytest

import jaxquant
from tests.networks import quantize

pytest.importorskip("tflite", reason="the schema of .tflite files is not installed (tflite)")
litert = pytest.importorskip(
    "ai_edge_litert.interpreter", reason="LiteRT is not installed (ai-edge-litert)"
)


def interpreter(path, *shapes, **settings):
    """The runtime with a file, its inputs of these shapes."""
    active = litert.Interpreter(str(path), num_threads=1, **settings)
    for entry, shape in zip(active.get_input_details(), shapes):
        active.resize_tensor_input(entry["index"], shape)
    active.allocate_tensors()
    return active


def run(path, *inputs, **settings):
    """All outputs for the flattened inputs, in the order of the file."""
    given = [np.asarray(x) for x in jax.tree.leaves(inputs)]
    active = interpreter(path, *(x.shape for x in given), **settings)
    for entry, x in zip(active.get_input_details(), given, strict=True):
        active.set_tensor(entry["index"], x)
    active.invoke()
    return [active.get_tensor(entry["index"]) for entry in active.get_output_details()]


def ops(path) -> list[str]:
    """The operators of a file, without those that the runtime puts there."""
    plain = litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    active = litert.Interpreter(str(path), experimental_op_resolver_type=plain)
    return [operator["op_name"] for operator in active._get_ops_details()]


def sqnr(reference, found) -> float:
    reference = np.asarray(reference, np.float64)
    noise = np.sum((reference - found) ** 2)
    return np.inf if noise == 0 else 10 * np.log10(np.sum(reference**2) / noise)


def agrees(tmp_path, params, apply_fn, *inputs, full=False, at_least=100.0, **export):
    """Quantize, export, and compare on another batch size; returns the operators of the file.

    100 dB is what the last bits of float32 leave: an integer that is one off is some 50.
    """
    if full:
        options = {"algo": "abs_max", "is_full_quantize": True, "recover": (), "progress": False}
        qparams, qapply = jaxquant.quant_post(params, apply_fn, [inputs], **options)
    else:
        asymmetric = {"activation_quantize_type": "asymmetric"}
        qparams, qapply = quantize(params, apply_fn, *inputs, **asymmetric)
    path = tmp_path / "model.tflite"
    jaxquant.export_litert(path, qparams, qapply, progress=False, **export)
    fewer = jax.tree.map(lambda x: x[:3], inputs)
    paths = jax.tree_util.tree_flatten_with_path(jax.jit(qapply)(qparams, *fewer))[0]
    wrong = {}
    for (where, expected), found in zip(paths, run(path, *fewer), strict=True):
        assert found.shape == expected.shape
        ratio = sqnr(np.asarray(expected, np.float32), found)
        if ratio < (np.inf if expected.dtype in (bool, np.int32) else at_least):
            wrong[jax.tree_util.keystr(where)] = ratio
    assert not wrong, wrong
    return ops(path)
