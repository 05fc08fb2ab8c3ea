"""Datasets in the forms that users have them, for the tests of the data iterator."""

import collections

import jax
import numpy as np

Pair = collections.namedtuple("Pair", ["image", "label"])


class RandomAccess:
    """A source with `__len__` and `__getitem__` that never raises IndexError, as some are."""

    def __init__(self, items):
        self.items = items
        self.reads = []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.reads.append(index)
        return self.items[index % len(self.items)]


class Iterable:
    """A source that can be iterated over again and again, with no length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Tensor:
    """A tensor of another framework: NumPy can convert it, and it can be sliced."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, "framework.float32"

    def __getitem__(self, key):
        return Tensor(self.array[key])

    def __iter__(self):
        return map(Tensor, self.array)

    def __array__(self, dtype=None, copy=None):
        return self.array


class DeviceTensor(Tensor):
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("move it to the host first")


class LazyMapping(collections.abc.Mapping):
    """A mapping that JAX does not know as a pytree, as `numpy.load` returns."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.reads = []

    def __getitem__(self, key):
        self.reads.append(key)
        return self.arrays[key]

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


def images(n, dtype=np.float32):
    return np.arange(n * 6, dtype=dtype).reshape(n, 2, 3)


def shapes(batches):
    return [jax.tree.map(np.shape, batch) for batch in batches]


def assert_batches_equal(actual, expected):
    actual = list(actual)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected):
        assert jax.tree.structure(a) == jax.tree.structure(e)
        jax.tree.map(np.testing.assert_array_equal, a, e)
