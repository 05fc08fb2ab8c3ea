"""The data iterator: every form of dataset, and how it is cut into batches."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxquant.calibration.data import iterate, num_batches
from tests.calibration.datasets import (
    Iterable,
    LazyMapping,
    Pair,
    RandomAccess,
    Tensor,
    assert_batches_equal,
    images,
    shapes,
)

# --- A whole dataset in memory ---


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_array_is_split_with_a_ragged_last_batch(asarray):
    x = asarray(images(5))
    batches = list(iterate(x, batch_size=2))
    assert_batches_equal(batches, [(x[:2],), (x[2:4],), (x[4:],)])
    assert {type(b[0]) for b in batches} == {type(x)}


def test_array_without_batch_size_is_one_batch():
    assert_batches_equal(iterate(images(5)), [(images(5),)])


def test_tuple_of_arrays_is_several_arguments():
    x, y = images(3), np.arange(3, dtype=np.int32)
    assert_batches_equal(iterate((x, y), batch_size=2), [(x[:2], y[:2]), (x[2:], y[2:])])


def test_dict_of_arrays_is_one_argument():
    data = {"a": images(3), "b": {"c": np.arange(3, dtype=np.int32)}}
    first, last = iterate(data, batch_size=2)
    assert_batches_equal([first], [({"a": images(3)[:2], "b": {"c": np.arange(2)}},)])
    assert shapes([last]) == [({"a": (1, 2, 3), "b": {"c": (1,)}},)]


def test_tensor_of_another_framework_is_a_whole_dataset():
    batches = list(iterate(Tensor(images(3)), batch_size=2))
    assert_batches_equal(batches, [(images(3)[:2],), (images(3)[2:],)])
    assert all(type(x) is np.ndarray for (x,) in batches)


def test_lazy_mapping_reads_only_what_is_selected():
    data = LazyMapping({"image": images(2), "name": np.array(["a", "b"])})
    assert_batches_equal(iterate(data, select="image"), [(images(2),)])
    assert set(data.reads) == {"image"}


def test_lazy_mapping_is_a_dict():
    assert_batches_equal(iterate(LazyMapping({"x": images(2)})), [({"x": images(2)},)])


@given(n=st.integers(1, 30), batch_size=st.integers(1, 12), batch_nums=st.integers(1, 12))
def test_forms_agree(n, batch_size, batch_nums):
    """In memory, as a list, by index and as a generator, the same samples give the same batches."""
    x = images(n)
    forms = [x, list(x), RandomAccess(list(x)), (s for s in x), lambda: iter(x), Iterable(list(x))]
    expected = [(x[i : i + batch_size],) for i in range(0, n, batch_size)][:batch_nums]
    for ds in forms:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            batches = list(iterate(ds, batch_size=batch_size, batch_nums=batch_nums))
        assert_batches_equal(batches, expected)


# --- Iterables of batches ---


def test_list_of_batches():
    batches = [images(2), images(4)]
    assert_batches_equal(iterate(batches), [(batches[0],), (batches[1],)])


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (images(2), (images(2),)),
        ((images(2), np.arange(2, dtype=np.int32)), (images(2), np.arange(2, dtype=np.int32))),
        ([images(2), images(1)], (images(2), images(1))),
        ({"x": images(2)}, ({"x": images(2)},)),
        (({"x": images(2)}, [images(2)]), ({"x": images(2)}, [images(2)])),
        (Pair(images(2), images(1)), (images(2), images(1))),
        (LazyMapping({"x": images(2)}), ({"x": images(2)},)),
    ],
)
def test_item_becomes_arguments(item, expected):
    assert_batches_equal(iterate([item]), [expected])


def test_random_access_source_of_batches_is_read_once_in_order():
    source = RandomAccess([images(2), images(2) + 1])
    assert_batches_equal(iterate(source), [(images(2),), (images(2) + 1,)])
    assert source.reads == [0, 1]


def test_callable_is_called_once_per_sweep_and_not_before():
    calls = []

    def samples():
        calls.append(1)
        yield from images(3)

    sweep = iterate(samples, batch_size=2)
    assert calls == []
    first = list(sweep)
    assert len(calls) == 1
    assert_batches_equal(iterate(samples, batch_size=2), first)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "source", [images(3), (images(3),), RandomAccess(list(images(3))), list(images(3))]
)
def test_callable_may_return_any_form(source):
    expected = [(images(3)[:2],), (images(3)[2:],)]
    assert_batches_equal(iterate(lambda: source, batch_size=2), expected)


# --- Single samples ---


def test_samples_are_stacked_leaf_by_leaf():
    samples = [({"x": image}, i) for i, image in enumerate(images(3))]
    assert_batches_equal(
        iterate(samples, batch_size=2),
        [
            ({"x": images(3)[:2]}, np.array([0, 1], np.int32)),
            ({"x": images(3)[2:]}, np.array([2], np.int32)),
        ],
    )


def test_stacked_jax_samples_stay_jax():
    (batch,) = iterate([jnp.ones(2), np.zeros(2, np.float32)], batch_size=2)
    assert isinstance(batch[0], jax.Array)
    np.testing.assert_array_equal(batch[0], [[1, 1], [0, 0]])


def test_samples_of_another_framework_become_numpy():
    (batch,) = iterate([{"x": Tensor(images(1)[0])}] * 3, batch_size=3)
    assert type(batch[0]["x"]) is np.ndarray
    assert batch[0]["x"].shape == (3, 2, 3)


# --- batch_nums ---


def test_batch_nums_reads_not_one_item_more():
    for batch_size, reads in [(None, 3), (4, 12)]:
        source = itertools.count(1.0)
        assert len(list(iterate(source, batch_size=batch_size, batch_nums=3))) == 3
        assert next(source) == 1.0 + reads


def test_batch_nums_in_memory():
    assert shapes(iterate(images(9), batch_size=2, batch_nums=2)) == [((2, 2, 3),), ((2, 2, 3),)]


def test_iterates_lazily():
    source = iter(images(6))
    assert next(iterate(source, batch_size=2))[0].shape == (2, 2, 3)
    np.testing.assert_array_equal(next(source), images(6)[2])


@pytest.mark.parametrize("ds", [[1.0] * 5, (x for x in [1.0] * 5), np.ones(5)])
def test_fewer_batches_than_asked_for_is_a_warning(ds):
    with pytest.warns(UserWarning, match=r"ds ended after 3 of batch_nums=7 batches\.$"):
        assert len(list(iterate(ds, batch_size=2, batch_nums=7))) == 3


def test_unsplit_array_with_batch_nums_warns_of_batch_size():
    with pytest.warns(UserWarning, match="after 1 of batch_nums=2 .* unless batch_size splits it"):
        list(iterate(images(5), batch_nums=2))


# --- num_batches ---


@pytest.mark.parametrize(
    ("ds", "batch_size", "batch_nums", "expected"),
    [
        (np.zeros((10, 2)), 4, None, 3),
        (np.zeros((10, 2)), 4, 2, 2),
        (np.zeros((10, 2)), None, None, 1),
        (np.zeros((0, 2)), None, None, 0),
        ({"x": np.zeros((10, 2))}, 5, 9, 2),
        ([1.0, 2.0, 3.0], None, None, 3),
        ([1.0, 2.0, 3.0], 2, None, 2),
        (RandomAccess([1.0, 2.0, 3.0]), 2, None, 2),
        (iter([1.0]), None, None, None),
        (iter([1.0]), None, 5, 5),
        (Iterable([1.0]), 2, None, None),
        (lambda: [1.0], 1, 7, 7),
    ],
)
def test_num_batches(ds, batch_size, batch_nums, expected):
    assert num_batches(ds, batch_size, batch_nums) == expected


def test_num_batches_of_an_endless_source_with_a_length():
    class Repeated(RandomAccess):
        def __len__(self):
            return 2**63 - 1

    assert num_batches(Repeated([1.0]), 8) is None
    assert num_batches(Repeated([1.0]), 8, 3) == 3


def test_num_batches_of_a_source_that_cannot_tell():
    class Unknown(Iterable):
        def __len__(self):
            raise TypeError("the length is unknown")

    assert num_batches(Unknown([1.0])) is None


def test_num_batches_selects():
    data = {"image": images(5), "name": ["a"]}
    assert num_batches(data, 2, select="image") == 3


@pytest.mark.parametrize("name", ["batch_size", "batch_nums"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-1, ValueError), (True, TypeError), (2.0, TypeError), ("2", TypeError)],
)
def test_counts_are_positive_integers(name, value, error):
    for function in (iterate, num_batches):
        with pytest.raises(error, match=rf"{name} must be a positive integer or None, got "):
            function(images(2), **{name: value})


def test_counts_may_be_numpy_integers():
    assert len(list(iterate(images(4), batch_size=np.int64(2), batch_nums=np.int32(1)))) == 1
