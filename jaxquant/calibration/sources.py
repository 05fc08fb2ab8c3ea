"""The forms in which a dataset comes, and how each is opened and read."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.calibration.selection import Select, select_arguments


def check_source(ds: Any) -> None:
    """Refuses what is no dataset.

    Raises:
      TypeError: `ds` can be neither iterated over, indexed nor called; or it is text.

    >>> check_source([1.0, 2.0])
    """
    # Asked before it is called or read, so that nothing of it is consumed.
    is_usable = is_in_memory(ds) or _is_iterable(ds) or _is_random_access(ds) or callable(ds)
    if isinstance(ds, str | bytes) or not is_usable:
        is_path = isinstance(ds, str | os.PathLike)
        raise TypeError(
            "ds must be an array, a tuple or dict of arrays, an iterable of batches or samples, or "
            f"a callable that returns one of these; got {_name(ds)}"
            + (": a path is not read, so open its files in a generator" if is_path else "")
        )


def open_source(ds: Any) -> Any:
    """Calls `ds` if it is a callable, and returns what is to be read.

    Raises:
      TypeError: the call gave no dataset.

    >>> open_source(lambda: [1.0, 2.0])
    [1.0, 2.0]
    """
    # An iterable that can be called too is read: calling it is for what is nothing else.
    if is_in_memory(ds) or _is_iterable(ds) or _is_random_access(ds):
        return ds
    try:
        source = ds()
        check_source(source)
    except Exception as error:
        error.add_note(f"Raised by ds(): ds is {_name(ds)}, which is called without arguments.")
        raise
    # A function that makes a function: one call too few, likely.
    if callable(source) and not (_is_iterable(source) or is_in_memory(source)):
        raise TypeError(f"ds() must return a dataset, but it returned another callable: {source!r}")
    return source


def is_in_memory(source: Any) -> bool:
    """Says whether a source is a whole dataset in memory: an array, or a tuple or dict of arrays.

    >>> is_in_memory(np.zeros(3)), is_in_memory((np.zeros(3),)), is_in_memory([np.zeros(3)])
    (True, True, False)
    """
    return isinstance(source, tuple | Mapping) or _is_array(source)


def num_samples(source: Any, select: Select) -> int:
    """Returns the length of the first axis, which all arrays of a dataset in memory must share.

    Raises:
      TypeError: a leaf is not an array.
      ValueError: a leaf has no first axis, or another length than the others.

    >>> num_samples({"image": np.zeros((5, 8)), "label": np.zeros(5)}, None)
    5
    """
    return _first_axis(_whole(source, select))


def slice_in_memory(
    source: Any, batch_size: int | None, select: Select
) -> Iterator[tuple[Any, ...]]:
    """Yields the arguments of each batch of a dataset in memory; one batch without `batch_size`.

    Raises:
      TypeError, ValueError: as `num_samples` and `select_arguments`.

    >>> [x.tolist() for (x,) in slice_in_memory(np.arange(5), 2, None)]
    [[0, 1], [2, 3], [4]]
    """
    whole = _whole(source, select)
    total = _first_axis(whole)
    # A data set of no samples is empty, and said so later.
    step = batch_size or max(total, 1)
    for index, start in enumerate(range(0, total, step)):
        part = jax.tree.map(lambda leaf, window=slice(start, start + step): leaf[window], whole)
        yield select_arguments(part, select, f"batch {index}") if callable(select) else part


def read_items(source: Any, batch_size: int | None) -> Iterator[tuple[str, Any]]:
    """Yields (place, item) for each item of an iterable or a random-access source.

    An item is a batch, or with `batch_size` a sample; the place names it in errors.

    Raises:
      Exception: whatever the source raises, with a note that names the place.

    >>> list(read_items("abc", 2))
    [('batch 0, sample 0', 'a'), ('batch 0, sample 1', 'b'), ('batch 1, sample 0', 'c')]
    """
    where = _place(0, batch_size)
    try:
        # An index is asked for from 0 on, as the sources of tfds have it.
        items = source if _is_iterable(source) else _by_index(source)
        for index, item in enumerate(items, start=1):
            yield where, item
            where = _place(index, batch_size)
    except Exception as error:
        error.add_note(f"Raised by ds, {_name(source)}, while it was read for {where}.")
        raise


def num_items(ds: Any) -> int | None:
    """Returns how many items an iterable or random-access source has, if it knows.

    >>> num_items([1, 2, 3]), num_items(iter([1, 2, 3]))
    (3, None)
    """
    # A length is a courtesy of the source. Whatever keeps it from telling, reading it will show.
    with contextlib.suppress(Exception):
        length = len(ds)
        return length if length < sys.maxsize else None  # repeated without end
    return None


def empty_message(ds: Any) -> str:
    """Says that a dataset gave no batch, and what is likely the cause.

    >>> empty_message([])
    'ds is empty: it gave no batch (ds is a list).'
    """
    text = f"ds is empty: it gave no batch (ds is {_name(ds)})."
    # By far the likeliest cause, and nothing to be seen in the data.
    if isinstance(ds, Iterator):
        text += (
            " A generator or another iterator can be read only once: if it has been read already, "
            "pass a callable that returns a fresh one, such as ds=lambda: samples()."
        )
    elif not (is_in_memory(ds) or _is_iterable(ds) or _is_random_access(ds)):
        text += " The callable must return a fresh iterator each time, not the same one again."
    return text


def _whole(source: Any, select: Select) -> Any:
    """The part of a dataset in memory that is sliced; a function selects from slices."""
    # A function may want the labels too, so that they are sliced along.
    if callable(select):
        return dict(source) if isinstance(source, Mapping) else source
    return select_arguments(source, select, "the whole")


def _first_axis(whole: Any) -> int:
    lengths: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        name = f"ds{jax.tree_util.keystr(path)}"
        if not _is_array(leaf):
            raise TypeError(
                f"a tuple or dict as ds is a whole dataset in memory, so {name} must be an array, "
                f"got {_name(leaf)}. Pick the model's inputs with select=, or pass a list of "
                "batches."
            )
        if not leaf.shape:
            raise ValueError(
                f"a tuple or dict as ds is a whole dataset in memory, so {name}, a scalar, needs a "
                "first axis that counts samples. Where it is a batch, with a counter or a cache, "
                "pass a list of batches: [ds]"
            )
        lengths[name] = int(leaf.shape[0])
    # A tuple of two batches looks like a data set of two arrays; their lengths give it away.
    if len(set(lengths.values())) > 1:
        raise ValueError(
            "a tuple or dict as ds is a whole dataset in memory, so its arrays must share their "
            f"first axis; got the lengths {lengths}. For several batches pass a list of them."
        )
    return next(iter(lengths.values()), 0)


def _by_index(source: Any) -> Iterator[Any]:
    for index in range(len(source)):
        yield source[index]


def _place(index: int, batch_size: int | None) -> str:
    if batch_size is None:
        return f"batch {index}"
    return f"batch {index // batch_size}, sample {index % batch_size}"


def _is_array(x: Any) -> bool:
    """NumPy and JAX arrays, and what is sliced like one: a tensor, an HDF5 or Zarr dataset."""
    return isinstance(x, np.ndarray | jax.Array) or all(
        hasattr(x, name) for name in ("shape", "dtype", "__getitem__", "__array__")
    )


def _is_iterable(x: Any) -> bool:
    return isinstance(x, Iterable)


def _is_random_access(x: Any) -> bool:
    # A class has `__getitem__` for its type parameters.
    return hasattr(x, "__len__") and hasattr(x, "__getitem__") and not isinstance(x, type)


def _name(x: Any) -> str:
    kind = type(x).__name__
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"
