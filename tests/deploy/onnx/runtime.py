"""Export, check and run in ONNX Runtime; compare with qapply."""

import jax
import numpy as np
import pytest

import jaxquant
from tests.networks import images, quantize

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def session(path, **settings):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    for name, value in settings.items():
        if "." in name:
            options.add_session_config_entry(name, value)
        else:
            setattr(options, name, value)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(path, *inputs, **settings):
    """All outputs for the flattened inputs, in the order of the file."""
    active = session(path, **settings)
    names = [entry.name for entry in active.get_inputs()]
    return active.run(None, dict(zip(names, map(np.asarray, jax.tree.leaves(inputs)), strict=True)))


def sqnr(reference, found) -> float:
    reference = np.asarray(reference, np.float64)
    noise = np.sum((reference - found) ** 2)
    return np.inf if noise == 0 else 10 * np.log10(np.sum(reference**2) / noise)


def first_rows(inputs, n):
    return jax.tree.map(lambda x: x[:n], inputs)


def agrees(tmp_path, params, apply_fn, *inputs, full=False, at_least=45.0, **options):
    """Quantize, export, and compare on another batch size; returns the ONNX model."""
    if full:
        qparams, qapply = jaxquant.quant_post(
            params, apply_fn, [inputs], algo="abs_max", is_full_quantize=True, progress=False
        )
    else:
        qparams, qapply = quantize(params, apply_fn, *inputs)
    path = tmp_path / "model.onnx"
    jaxquant.export_onnx(path, qparams, qapply, **options)
    fewer = first_rows(inputs, 2)
    expected, found = qapply(qparams, *fewer), run(path, *fewer)
    paths = jax.tree_util.tree_flatten_with_path(expected)[0]
    assert len(found) == len(paths)
    wrong = {}
    for (where, a), b in zip(paths, found, strict=True):
        assert b.shape == a.shape
        ratio = sqnr(np.asarray(a, np.float32), b)
        if ratio < (np.inf if a.dtype in (bool, np.int32) else at_least):
            wrong[jax.tree_util.keystr(where)] = ratio
    assert not wrong
    return onnx.load(path)


def weights(*shape, seed=7):
    return images(seed, shape) * 0.4


def behind_dot(functions, follow=True):
    """Every function of the result of a dot, with another dot behind it."""

    def apply_fn(p, x):
        y = x @ p["a"]
        results = {name: function(y) for name, function in functions.items()}
        if not follow:
            return results
        return {name: z @ p["b"][: z.shape[-1]] for name, z in results.items()}

    return apply_fn


def ops(model) -> list[str]:
    return [node.op_type for node in model.graph.node]
