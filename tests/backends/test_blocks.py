"""Products of floats with stored weights by XLA, of few rows and of many, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.backends import blocks
from jaxquant.backends.backend import Product
from tests import networks
from tests.native.cases import stored


@pytest.mark.parametrize("sums_last", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("length", "columns", "group_size"), [(130, 150, 130), (331, 20, 32), (7, 1, 3), (5, 0, 5)]
)
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_rows_times_stored_integers(rows, length, columns, group_size, bits, sums_last):
    integers, scale, weight = stored(bits, length, columns, group_size, sums_last)
    x = networks.images(0, (rows, length))
    product = Product(
        rows, length, (columns,), sums_last, jnp.float32, weight_bits=bits, group_size=group_size
    )
    found = jax.jit(lambda *arrays: blocks.dot(product, *arrays))(x, integers, scale)
    expected = np.asarray(x, np.float64) @ weight
    sizes = np.abs(np.asarray(x, np.float64)) @ np.abs(weight)
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= 2.0**-24 * (length + 2) * sizes).all()


def test_many_rows_are_one_product():
    """Of few rows a loop goes over blocks of the weight."""
    integers, scale, _ = stored(8, 640, 8, 640, sums_last=False)

    def loops(rows):
        product = Product(rows, 640, (8,), False, jnp.float32, weight_bits=8, group_size=640)
        x = jnp.zeros((rows, 640))
        text = jax.jit(lambda *arrays: blocks.dot(product, *arrays)).lower(x, integers, scale)
        return text.as_text().count("stablehlo.while")

    assert (loops(16), loops(17)) == (1, 0)
