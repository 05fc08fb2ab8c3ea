"""The warning of weights that take more room than those of the float model."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from jaxquant.analysis.larger import warn_if_larger
from tests import networks


def stored(shape):
    return {"int8": np.zeros(shape, np.int8), "scale": np.zeros(shape[-1:], np.float32)}


def test_two_forms_of_a_weight_are_less_than_its_floats():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = {"dense": {"kernel": np.zeros((64, 32), np.float32)}}
        warn_if_larger(params, {"params": {"dense": {"kernel": stored((64, 32))}}})


def test_it_names_what_grew():
    params = {"a": np.zeros((8, 8), np.float32), "b": np.zeros((8, 8), np.float32)}
    arrays = {**stored((8, 8)), "int8_1": np.zeros((8, 256), np.int8), "float": params["a"]}
    with pytest.warns(UserWarning, match=r"a \(256 bytes\) as float float32\[8, 8\]") as caught:
        warn_if_larger(params, {"params": {"a": arrays}})
    assert "b (" not in str(caught[0].message)


def test_the_product_of_two_factors():
    params = {"down": networks.images(0, (64, 2)), "up": networks.images(1, (2, 64))}
    x = jnp.asarray(networks.images(2, (3, 64)))
    with pytest.warns(UserWarning, match="What sites multiply by is stored") as caught:
        jaxquant.quant_weights(params, lambda p, x: x @ (p["down"] @ p["up"]), x, progress=False)
    assert caught[0].filename == __file__
