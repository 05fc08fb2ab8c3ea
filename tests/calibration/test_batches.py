"""What the leaves of a batch become, and which samples and batches do not fit together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxquant.calibration.data import iterate
from tests.calibration.datasets import DeviceTensor, images


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (np.zeros(2, np.float64), np.float32),
        (np.zeros(2, np.int64), np.int32),
        (np.zeros(2, np.uint64), np.uint32),
        (np.zeros(2, np.uint8), np.uint8),
        (np.zeros(2, np.float16), np.float16),
        (np.zeros(2, jnp.bfloat16), jnp.bfloat16),
        (np.zeros(2, bool), np.bool_),
        (1.5, np.float32),
        (3, np.int32),
        (True, np.bool_),
        (np.float64(1.5), np.float32),
    ],
)
def test_dtypes_are_those_of_jax(leaf, dtype):
    ((x,),) = iterate([(leaf,)])
    assert type(x) is np.ndarray
    assert x.dtype == dtype
    assert x.dtype == jnp.asarray(leaf).dtype


def test_bytes_come_in_the_order_of_this_processor():
    (((x,)),) = iterate([(np.array([1.5, -2.0], ">f4"),)])
    assert x.dtype.isnative
    np.testing.assert_array_equal(jnp.asarray(x), [1.5, -2.0])


def test_64_bits_stay_where_jax_has_them():
    with jax.enable_x64(True):
        ((x,),) = iterate(np.zeros(2))
    assert x.dtype == np.float64


def test_arrays_are_not_copied():
    x, y = images(2), jnp.ones(2)
    ((a, b),) = iterate([(x, y)])
    assert a is x or np.shares_memory(a, x)
    assert b is y


def test_random_keys_pass():
    key = jax.random.key(0)
    ((_, k),) = iterate([(images(2), key)])
    assert k is key


def test_empty_batch():
    with pytest.raises(
        ValueError, match=r"batch 1 of ds is empty: inputs\[0\] is float32\[0,2,3\]"
    ):
        list(iterate([images(2), images(0)]))


def test_batch_without_arrays():
    with pytest.raises(ValueError, match="batch 0 of ds holds no array"):
        list(iterate([{}]))


@pytest.mark.parametrize(
    "leaf", ["a.jpg", b"bytes", np.array(["a"]), object(), {1, 2}, np.array([None])]
)
def test_leaf_that_is_not_numeric(leaf):
    items = [{"x": images(2), "id": 0}, {"x": images(2), "id": leaf}]
    match = r"batch 1 of ds: inputs\[0\]\['id'\] is not numeric.*select="
    with pytest.raises(TypeError, match=match):
        list(iterate(items))


def test_text_in_a_sample_names_the_sample():
    samples = [(1.0,), (1.0,), (1.0,), ("text",)]
    with pytest.raises(TypeError, match=r"batch 1, sample 1 of ds: inputs\[0\] .*'text'"):
        list(iterate(samples, batch_size=2))


def test_leaf_that_cannot_be_converted():
    match = r"batch 0 of ds: inputs\[0\]\['x'\] is a DeviceTensor .*move it to the host first"
    with pytest.raises(TypeError, match=match):
        list(iterate([{"x": DeviceTensor(images(2))}]))


@pytest.mark.parametrize(
    ("odd", "difference"),
    [
        (np.zeros((3, 3), np.float32), r"inputs\[0\] is float32\[3,3\] instead of float32\[2,3\]"),
        (np.zeros((2, 3), np.uint8), r"inputs\[0\] is uint8\[2,3\] instead of float32\[2,3\]"),
        (({"x": 1.0},), r"\(\{x: float32\[\]\},\) instead of \(float32\[2,3\],\)"),
    ],
)
def test_samples_that_do_not_stack(odd, difference):
    samples = [*images(4), odd]
    with pytest.raises(ValueError, match=rf"batch 1: .* sample 1 differs .* 0: {difference}"):
        list(iterate(samples, batch_size=3))


@pytest.mark.parametrize(
    ("odd", "difference"),
    [
        (np.zeros((2, 2, 3), np.int32), r"inputs\[0\] is int32\[2,2,3\] instead of"),
        (np.zeros((2, 2), np.float32), r"inputs\[0\] is float32\[2,2\] instead of"),
        (np.float32(0), r"inputs\[0\] is float32\[\] instead of"),
        ((images(2), images(2)), r"\(float32\[2,2,3\], float32\[2,2,3\]\) instead of"),
        ({"x": images(2)}, r"\(\{x: float32\[2,2,3\]\},\) instead of \(float32\[4,2,3\],\)"),
    ],
)
def test_batches_that_differ_from_the_first(odd, difference):
    with pytest.raises(ValueError, match=rf"batch 2 of ds differs from batch 0: {difference}"):
        list(iterate([images(4), images(2), odd]))


def test_batches_may_have_other_sizes():
    batches = [images(4), np.zeros((2, 3, 3), np.float32)]
    assert [x.shape for (x,) in iterate(batches)] == [(4, 2, 3), (2, 3, 3)]


def test_batches_before_a_bad_one_are_yielded():
    batches = iterate([images(4), "text"])
    assert next(batches)[0].shape == (4, 2, 3)
    with pytest.raises(TypeError, match="batch 1"):
        next(batches)
