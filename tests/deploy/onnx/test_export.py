"""Which operators an export may use, and what it says of operations that it does not cover."""

import inspect
import re

import jax
import pytest
from jax import lax

import jaxquant
from tests.deploy.onnx.runtime import agrees, weights
from tests.networks import images, quantize

IMAGE = (3, 8, 8, 4)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: lax.lgamma(x), "'lgamma'"),
        (lambda x: lax.cumlogsumexp(x, 1), "'cumlogsumexp'"),
    ],
)
def test_an_operation_that_is_not_covered_is_named_with_its_scope(function, named, tmp_path):
    params = {"w": weights(4, 4)}

    def apply_fn(p, x):
        with jax.named_scope("block7"):
            x = function(x)
        return x @ p["w"]

    qparams, qapply = quantize(params, apply_fn, images(0, (3, 5, 4)))
    with pytest.raises(ValueError, match=rf"does not cover .*{named}.*block7"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply)
    assert not (tmp_path / "m.onnx").exists()


def _unknown(x):
    return lax.digamma(x + 20)  # this line is in the error


def test_without_scopes_an_error_names_line_and_site(tmp_path):
    """In a plain function nothing has a name but its parameters."""

    def apply_fn(p, x):
        return _unknown(jax.nn.relu(x @ p["first"])) @ p["last"]

    params = {"first": weights(4, 6), "last": weights(6, 4)}
    qparams, qapply = quantize(params, apply_fn, images(0, (3, 4)))
    lines = inspect.getsourcelines(_unknown)
    where = f"test_export.py:{lines[1] + 1}, behind site 'first'"
    with pytest.raises(ValueError, match=rf"'digamma'.*{re.escape(where)}"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply)
    path = tmp_path / "model"
    jaxquant.save_quantized_model(path, qparams, qapply)
    with pytest.raises(ValueError, match=r"'digamma'.*behind site 'first'"):
        jaxquant.export_onnx(tmp_path / "m.onnx", *jaxquant.load_quantized_model(path))


@pytest.mark.parametrize("opset", [13, 18, 23])
def test_opsets(opset, tmp_path):
    def apply_fn(p, x):
        return (x @ p).max(1).sum(1)

    model = agrees(tmp_path, weights(4, 6), apply_fn, images(0, IMAGE), opset=opset)
    assert model.opset_import[0].version == opset


def test_an_opset_out_of_range_is_an_error(tmp_path):
    qparams, qapply = quantize(weights(4, 6), lambda p, x: x @ p, images(0, IMAGE))
    with pytest.raises(ValueError, match="opset=12: 13 to 23"):
        jaxquant.export_onnx(tmp_path / "m.onnx", qparams, qapply, opset=12)
