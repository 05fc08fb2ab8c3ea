"""A data set of one value is told from data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxquant
from tests import networks

W = {"w": jnp.eye(4)}


def dot(p, x):
    return x @ p["w"]


def calibrate(ds, apply_fn=dot, **options):
    return jaxquant.calibrate(W, apply_fn, ds, progress=False, **options)


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("library", [np, jnp])
def test_one_value_is_no_data(value, library):
    batches = [library.full((4, 4), value, library.float32) for _ in range(3)]
    with pytest.raises(ValueError, match=f"ds holds no data: each of its 48 values is {value:g}. "):
        calibrate(batches)


def test_every_input_is_looked_at():
    def scaled(p, x, mask):
        return dot(p, x * mask)

    ones = np.ones((8, 4), np.float32)
    with pytest.raises(ValueError, match=r"each of its 64 values is 0, 1\."):
        calibrate([(0 * ones, ones)], scaled)
    calibrate([(np.arange(32, dtype=np.float32).reshape(8, 4), ones)], scaled)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_one_other_value_is_enough(last):
    batches = [np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)]
    batches[1][3, 3] = last
    if last:
        assert calibrate(batches).batches == 2
    else:
        with pytest.raises(ValueError, match="ds holds no data"):
            calibrate(batches)


def test_keys_among_the_inputs_do_not_count():
    def noisy(p, x, key):
        return dot(p, x + jax.random.normal(key, x.shape))

    with pytest.raises(ValueError, match="ds holds no data"):
        calibrate([(np.ones((4, 4), np.float32), jax.random.key(0))], noisy)


def test_a_resumed_sweep_that_has_seen_data(tmp_path):
    def batches(stop):
        yield np.arange(256, dtype=np.float32).reshape(64, 4)
        if stop:
            raise KeyboardInterrupt
        yield np.zeros((64, 4), np.float32)

    file = tmp_path / "seen"
    with pytest.raises(KeyboardInterrupt):
        calibrate(lambda: batches(True), calibration_file=file)
    assert calibrate(lambda: batches(False), calibration_file=file).batches == 2


def test_thresholds_that_are_all_zero():
    with pytest.raises(ValueError, match="every tensor that was calibrated was all zero"):
        networks.quantize(W, dot, jnp.zeros((1, 4)))
