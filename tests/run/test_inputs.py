"""Inputs that are unlike those of calibration are noticed."""

import copy
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

PARAMS = {"w": networks.images(0, (6, 3))}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 6)).astype(np.uint8)
FLOATS = PIXELS.astype(np.float32)


def dot(p, x):
    return x.astype(jnp.float32) @ p["w"]


@pytest.fixture
def bytes_model():
    return networks.quantize(PARAMS, dot, PIXELS)


@pytest.fixture
def floats_model():
    return networks.quantize(PARAMS, dot, FLOATS)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_floats_in_place_of_integers(bytes_model, wrap):
    qparams, qapply = bytes_model
    with pytest.raises(ValueError, match=r"inputs\[0\] is float32, but .* calibrated with uint8"):
        wrap(qapply)(qparams, FLOATS / 255)
    with pytest.raises(ValueError, match="is float32, but"):
        qapply.check(qparams, FLOATS)
    assert wrap(qapply)(qparams, PIXELS.astype(np.int32)).shape == (16, 3)


def test_integers_in_place_of_floats(floats_model):
    qparams, qapply = floats_model
    with pytest.raises(ValueError, match="is uint8, but the model was calibrated with float32"):
        qapply(qparams, PIXELS)
    assert qapply(qparams, FLOATS.astype(jnp.bfloat16)).shape == (16, 3)


def test_the_type_of_a_scalar_does_not_count():
    qparams, qapply = networks.quantize(PARAMS, lambda p, x, t: dot(p, x) * t, FLOATS, 2.0)
    with jax.numpy_dtype_promotion("standard"):
        assert qapply(qparams, FLOATS, 2).shape == (16, 3)


def test_a_dynamic_model_takes_the_types_that_the_float_model_takes():
    qparams, qapply = jaxquant.quant_dynamic(PARAMS, dot, PIXELS)
    assert qapply(qparams, FLOATS / 255).shape == (16, 3)


@pytest.mark.parametrize(
    ("x", "here"),
    [
        (FLOATS / 255, r"\[0, 1\]"),
        (FLOATS * 255, r"\[0, 6.5\d*e\+04\]"),
        (FLOATS - 1000, r"\[-1000, -745\]"),
    ],
)
def test_values_far_from_the_calibrated_ones(floats_model, x, here):
    qparams, qapply = floats_model
    match = rf"inputs\[0\] is in {here}, in calibration it was in \[0, 255\]"
    with pytest.raises(ValueError, match=match):
        qapply.check(qparams, x)
    qapply(qparams, np.zeros_like(x))  # to warm up
    with pytest.warns(UserWarning, match=match):
        qapply(qparams, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qapply(qparams, x)  # once


@pytest.mark.parametrize("x", [FLOATS[:1], FLOATS / 2, FLOATS + 100, FLOATS * 0 + 7])
def test_values_that_are_near_enough(floats_model, x):
    qparams, qapply = floats_model
    qapply.check(qparams, x)
    qapply(qparams, x)


def test_traced_values_are_not_looked_at(floats_model):
    qparams, qapply = floats_model
    assert jax.jit(qapply)(qparams, FLOATS / 255).shape == (16, 3)


@pytest.mark.parametrize("pick", [lambda m: m, lambda m: m.with_backend("xla")])
def test_copies_are_the_model_and_pickling_names_the_file(floats_model, pick):
    qparams, qapply = floats_model
    qapply = pick(qapply)
    np.testing.assert_array_equal(
        copy.deepcopy(qapply)(copy.deepcopy(qparams), FLOATS), qapply(qparams, FLOATS)
    )
    assert copy.copy(qapply) is qapply
    with pytest.raises(TypeError, match="save_quantized_model"):
        pickle.dumps((qparams, qapply))
    pickle.loads(pickle.dumps(qparams))


def test_pickling_a_loaded_model(floats_model, tmp_path):
    jaxquant.save_quantized_model(tmp_path / "model", *floats_model)
    _, qapply = jaxquant.load_quantized_model(tmp_path / "model")
    with pytest.raises(TypeError, match="save_quantized_model"):
        pickle.dumps(qapply)
    assert copy.deepcopy(qapply) is qapply


def test_single_samples_of_a_batch_are_told():
    """Under `jax.vmap`, where a bias has no axis for the batch to be spread along."""
    params = {"w": jnp.ones((6, 8)), "b": jnp.ones(8)}
    qparams, qapply = networks.quantize(params, lambda p, x: x @ p["w"] + p["b"], jnp.ones((16, 6)))
    with pytest.raises(ValueError, match="another graph") as raised:
        jax.vmap(qapply, (None, 0))(qparams, jnp.ones((3, 6)))
    note = raised.value.__notes__[0]
    assert "called with inputs of float32[6]; it was quantized with float32[16, 6]" in note
    one_by_one = jax.vmap(lambda x: qapply(qparams, x[None])[0])
    assert one_by_one(jnp.ones((3, 6))).shape == (3, 8)
