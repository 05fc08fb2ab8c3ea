"""The parameters of primitives as plain data."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxquant.deploy.stored import values


def no_body(_):
    raise AssertionError("there is no body")


def back(value, known=None):
    data = json.loads(json.dumps(values.encode(value, no_body), allow_nan=False))
    return values.decode(data, known or {}, no_body)


NUMBERS = lax.GatherDimensionNumbers((1,), (0,), (0,), (), ())


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, -1, "same", 0.1, math.inf, (), (1, (2, (None,))), NUMBERS,
        np.dtype("float32"), jnp.dtype(jnp.bfloat16), jnp.dtype("int4"), lax.Precision.HIGHEST,
        lax.GatherScatterMode.CLIP, (lax.Precision.DEFAULT, None),
        lax.ConvDimensionNumbers((0, 1, 2), (2, 1, 0), (0, 2, 1)), lax.FftType.RFFT,
    ],
)  # fmt: skip
def test_values_come_back(value):
    assert back(value) == value
    assert type(back(value)) is type(value) or isinstance(value, np.dtype)


def test_numpy_scalars_keep_their_dtype():
    for value in (np.float32(0.1), np.int8(-3), np.bool_(True), np.complex64(1 + 2j)):
        assert back(value) == value
        assert back(value).dtype == value.dtype
    assert np.isnan(back(np.float16("nan")))
    assert back(jnp.bfloat16(0.3)).dtype == jnp.bfloat16
    assert np.signbit(back(np.float32(-0.0)))


def test_sizes_become_numbers():
    b, h = jax.export.symbolic_shape("b, h")
    assert back((b, 2 * h + 1, 3), {"b": 4, "h": 5}) == (4, 11, 3)


def test_keys_have_dtypes():
    for implementation in ("threefry2x32", "rbg"):
        dtype = jax.random.key(0, impl=implementation).dtype
        assert values.decode_dtype(values.encode_dtype(dtype)) == dtype


def test_values_without_a_form_are_named():
    with pytest.raises(ValueError, match="a function has no form in a file"):
        values.encode(no_body, no_body)


@pytest.mark.parametrize(
    "data",
    [
        {}, {"a": 1, "b": 2}, {"code": "x"}, {"dtype": "object"}, {"dtype": "U3"}, {"dtype": 3},
        {"dtype": "datetime64[s]"}, {"dtype": "float33"}, {"dtype": "key:no"}, {"dtype": ">f4"},
        {"enum": ["Precision", "NO"]}, {"enum": ["os", "x"]}, {"enum": "x"}, {"enum": [[], {}]},
        {"record": ["GatherDimensionNumbers", {"x": 1}]}, {"record": ["dict", {}]}, {"float": "x"},
        {"scalar": 3}, {"scalar": [300, "int8"]}, {"scalar": [1.5, "int8"]},
        {"scalar": [1, "bool"]}, {"scalar": [True, "int8"]}, {"scalar": [[1], "complex64"]},
        {"scalar": [0, "key:rbg"]},
        {"size": "("}, {"size": 3}, {"body": "x"}, {"generator": "no"}, 2**63,
    ],
)  # fmt: skip
def test_damage_is_refused(data):
    with pytest.raises((ValueError, TypeError)):
        values.decode(data, {}, no_body)
