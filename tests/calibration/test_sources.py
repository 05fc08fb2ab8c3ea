"""What the data iterator says of a dataset that it cannot read."""

import re

import numpy as np
import pytest

from jaxquant.calibration.data import iterate
from tests.calibration.datasets import RandomAccess, images


@pytest.mark.parametrize("ds", [None, 3, "images", b"images", object()])
def test_no_dataset(ds):
    with pytest.raises(TypeError, match=f"ds must be an array.*got an? {type(ds).__name__}"):
        iterate(ds)


@pytest.mark.parametrize(
    ("ds", "hint"),
    [
        ([], "ds is a list"),
        (iter([]), "pass a callable that returns a fresh one"),
        ((x for x in ()), "pass a callable that returns a fresh one"),
        (lambda: iter([]), "The callable must return a fresh iterator"),
        (np.zeros((0, 3)), "ds is a ndarray"),
        ({}, "ds is a dict"),
        (RandomAccess([]), "ds is a RandomAccess"),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_empty(ds, hint, batch_size):
    with pytest.raises(ValueError, match=f"ds is empty: it gave no batch.*{hint}"):
        list(iterate(ds, batch_size=batch_size, batch_nums=3))


def test_exhausted_generator():
    samples = (x for x in images(2))
    list(iterate(samples, batch_size=2))
    with pytest.raises(ValueError, match=r"ds is empty.*can be read only once"):
        list(iterate(samples, batch_size=2))


def test_arrays_in_memory_share_their_first_axis():
    data = (images(3), {"y": np.zeros(2)})
    match = re.escape("got the lengths {'ds[0]': 3, \"ds[1]['y']\": 2}")
    with pytest.raises(ValueError, match=match):
        list(iterate(data))


def test_scalar_in_memory():
    with pytest.raises(ValueError, match=r"ds\[1\], a scalar.*\[ds\]"):
        list(iterate((images(3), np.float32(1))))
    with pytest.raises(ValueError, match=r"ds\[0\], a scalar"):
        list(iterate(np.float32(1)))


def test_leaf_in_memory_that_is_no_array():
    with pytest.raises(
        TypeError, match=r"ds\[0\]\['name'\]\[0\] must be an array, got a str.*select="
    ):
        list(iterate({"image": images(2), "name": ["a", "b"]}))


def failing(good):
    yield from good
    raise OSError("disk")


@pytest.mark.parametrize(("batch_size", "place"), [(None, "batch 3"), (2, "batch 1, sample 1")])
def test_exception_of_the_source_has_a_note(batch_size, place):
    with pytest.raises(OSError, match="disk") as info:
        list(iterate(failing(images(3)), batch_size=batch_size))
    (note,) = info.value.__notes__
    assert note == f"Raised by ds, a generator, while it was read for {place}."


def test_exception_of_random_access_has_a_note():
    class Broken(RandomAccess):
        def __getitem__(self, index):
            raise IndexError("no such record")

    with pytest.raises(IndexError, match="no such record") as info:
        list(iterate(Broken([1, 2])))
    assert "Broken" in info.value.__notes__[0]
    assert "batch 0" in info.value.__notes__[0]


def test_callable_that_takes_arguments():
    with pytest.raises(TypeError, match="missing 1 required") as info:
        list(iterate(lambda split: [split]))
    assert "called without arguments" in info.value.__notes__[0]


@pytest.mark.parametrize(
    ("result", "match"), [(None, "got a NoneType"), (lambda: [1.0], "another callable")]
)
def test_callable_that_returns_no_dataset(result, match):
    with pytest.raises(TypeError, match=match):
        list(iterate(lambda: result))
