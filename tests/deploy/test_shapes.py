"""The shapes that a model is exported for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.deploy.shapes import input_specs
from tests.deploy.models import SHAPE, same_bits, small
from tests.networks import images

EXAMPLE = (jnp.ones((8, 4, 2)),)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1, 4, 2", "(1, 4, 2)"),
        ("1, ...", "(1, 4, 2)"),
        ("(3, 5, _)", "(3, 5, 2)"),
        ("b, 5, ...", "(b, 5, 2)"),
        ("floordiv(b, 2), 1, 2", "(floordiv(b, 2), 1, 2)"),
        ("0, 4, 2", "(0, 4, 2)"),
        (None, "(8, 4, 2)"),
    ],
)
def test_numbers_need_not_be_those_of_the_example(text, shape):
    (spec,) = input_specs(EXAMPLE, text)
    assert f"({', '.join(map(str, spec.shape))})" == shape


def test_one_text_for_all_inputs_or_one_for_each():
    example = jnp.ones((8, 4)), {"a": jnp.ones((8, 3)), "b": jnp.float32(1)}
    specs = input_specs(example, ("1, 4", {"a": "2, ...", "b": ""}))
    assert jax.tree.map(lambda s: s.shape, specs) == ((1, 4), {"a": (2, 3), "b": ()})
    (spec, more) = input_specs((jnp.ones((8, 4)), jnp.ones((8, 3))), "1, ...")
    assert (spec.shape, more.shape) == ((1, 4), (1, 3))


@pytest.mark.parametrize("text", ["1, 4", "1, 4, 2, 1", "b, 1, 1, 2, ...", ""])
def test_another_number_of_axes_is_an_error(text):
    with pytest.raises(ValueError, match=r"sizes for an array of shape \(8, 4, 2\)"):
        input_specs(EXAMPLE, text)


@pytest.mark.parametrize("shapes", [("a, 4, 2", "b, 4, 2"), (1, 4, 2), [1, 4, 2], {"x": "1"}, 1])
def test_what_is_no_text_for_each_input_is_an_error(shapes):
    with pytest.raises(ValueError, match=r"the model has 1 inputs; shapes are a text"):
        input_specs(EXAMPLE, shapes)


def test_a_size_that_varies_is_no_negative_number():
    with pytest.raises(ValueError, match="below 0; one that varies has a name"):
        input_specs(EXAMPLE, "-1, 4, 2")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_is_exported_for_another_batch_than_it_was_quantized_with(batch, tmp_path):
    qparams, qapply = small()
    assert SHAPE[0] not in (1, 3)
    shapes, x = f"{batch}, 8, 8, 3", images(3, (batch, 8, 8, 3))
    expected = qapply(qparams, x)
    path = tmp_path / "model.jaxexport"
    jaxquant.export_stablehlo(path, qparams, qapply, shapes=shapes)
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.in_avals[-1].shape == x.shape
    assert same_bits(exported.call(qparams, x), expected)


def test_onnx_of_a_fixed_size(tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    qparams, qapply = small()
    path, x = tmp_path / "model.onnx", images(3, (1, 8, 8, 3))
    jaxquant.export_onnx(path, qparams, qapply, shapes="1, 8, 8, 3")
    sizes = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in sizes] == [1, 8, 8, 3]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_allclose(found, qapply(qparams, x), rtol=1e-4, atol=1e-5)


def test_a_model_of_single_samples_is_told_how_to_be_saved(tmp_path):
    params, path = {"w": jnp.eye(4)}, tmp_path / "model"
    qparams, qapply = jaxquant.quant_dynamic(params, lambda p, x: x @ p["w"], jnp.ones(4))
    with pytest.raises(ValueError, match=r"without it the first axis of every input is the batch"):
        jaxquant.save_quantized_model(path, qparams, qapply)
    jaxquant.save_quantized_model(path, qparams, qapply, shapes="4")
