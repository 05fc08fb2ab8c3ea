"""Keywords of other libraries and misspelt ones say what to write instead."""

import dataclasses
import inspect

import jax.numpy as jnp
import pytest

import jaxquant
from jaxquant.keywords import PADDLE

PUBLIC = (
    jaxquant.quant_post,
    jaxquant.calibrate,
    jaxquant.quantize,
    jaxquant.quant_dynamic,
    jaxquant.quant_weights,
)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
@pytest.mark.parametrize("keyword", ["executor", "model_dir", "skip_tensor_list", "onnx_format"])
def test_a_keyword_of_paddles_says_what_stands_for_it(function, keyword):
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(\) has no argument '{keyword}'"
    ) as e:
        function({}, lambda p, x: x, [jnp.ones((1, 1))], **{keyword: None})
    assert PADDLE[keyword] in str(e.value)


def test_a_misspelt_keyword_names_the_nearest():
    with pytest.raises(TypeError, match="'batchsize'; nearest: batch_size"):
        jaxquant.quant_post({}, lambda p, x: x, [jnp.ones((1, 1))], batchsize=4)


def test_no_keyword_of_ours_is_told_to_be_paddles():
    ours = {name for function in PUBLIC for name in inspect.signature(function).parameters}
    assert ours & set(PADDLE) == {"weight_bits"}  # of quant_weights alone
    with pytest.raises(TypeError, match="weight_bits=4"):
        jaxquant.quant_post({}, lambda p, x: x, [jnp.ones((1, 1))], weight_bits=4)


def test_a_signature_has_the_settings_one_by_one():
    shown = inspect.signature(jaxquant.quant_post).parameters
    config = jaxquant.QuantConfig()
    assert {"algo", "recover", "rules"} <= set(shown)
    for name in shown.keys() & {field.name for field in dataclasses.fields(config)}:
        assert shown[name].default == getattr(config, name)


def test_signatures_stay_readable():
    assert list(inspect.signature(jaxquant.quant_post).parameters)[:3] == [
        "params",
        "apply_fn",
        "ds",
    ]
    assert "ds" in jaxquant.quant_post.__doc__
