"""Columns of outputs: closed-form cases."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.recover.columns import Columns, measure_columns


def columns(y, y_hat) -> Columns:
    return Columns.of(np.asarray(measure_columns(jnp.asarray(y), jnp.asarray(y_hat))))


Y = np.array([[1.0, 0.1, 0.0, 0.0], [-1.0, 0.2, 3.0, 0.0]], np.float32)
Y_HAT = np.array([[1.1, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]], np.float32)


def test_signal_and_noise_of_each_column():
    found = columns(Y, Y_HAT)
    np.testing.assert_allclose(found.signal, [2.0, 0.05, 9.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(found.noise, [0.01, 0.05, 9.0, 0.0], rtol=1e-5)
    np.testing.assert_allclose(found.sqnr_db, [10 * np.log10(200), 0, 0, np.nan], atol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_columns_of_any_size(size: float):
    sizes = np.array([1, size, 1, size], np.float32)
    want = columns(Y, Y_HAT)
    found = columns(Y * sizes, Y_HAT * sizes)
    np.testing.assert_allclose(found.signal, want.signal * np.float64(sizes) ** 2, rtol=1e-5)
    np.testing.assert_allclose(found.sqnr_db, want.sqnr_db, atol=1e-4)


def test_a_lost_column_varies_without_a_zero_and_is_one_value_in_int8():
    assert columns(Y, Y_HAT).lost.tolist() == [False, True, False, False]


def test_what_is_not_finite():
    """A NaN of the float model is left out; one of the int8 model alone is infinite noise."""
    y, y_hat = Y.copy(), Y_HAT.copy()
    y[0, 0], y_hat[0, 1] = np.nan, np.nan
    found = columns(y, y_hat)
    assert found.signal[0] == 1.0
    assert found.sqnr_db[1] == -np.inf


@pytest.mark.parametrize("shape", [(), (5,), (0, 4)])
def test_there_are_no_columns_below_two_axes_or_without_samples(shape):
    assert columns(np.ones(shape, np.float32), np.ones(shape, np.float32)).lost.shape == (0,)
