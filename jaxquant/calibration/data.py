"""The data iterator: any dataset, read as the arguments of `apply_fn`, one batch after another."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

from jaxquant.calibration.batches import Batch, BatchChecker, stack_samples, to_arrays
from jaxquant.calibration.selection import Select, check_select, select_arguments
from jaxquant.calibration.sources import (
    check_source,
    empty_message,
    is_in_memory,
    num_items,
    num_samples,
    open_source,
    read_items,
    slice_in_memory,
)


def iterate(
    ds: Any,
    *,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    select: Select = None,
) -> Iterator[Batch]:
    """Iterates over the batches of a dataset, as the arguments that `apply_fn` takes after params.

    Below, `N` is the number of samples and `B` the size of a batch.

    The forms of `ds`:

    * An array `[N, ...]` (NumPy, JAX, or anything that can be sliced and has a shape and a dtype),
      or a tuple or dict of such arrays that share `N`: a whole dataset in memory. It is split into
      batches of `batch_size`, the last one ragged; without `batch_size` it is one batch.
    * Any other iterable (a list, a generator, a `tf.data.Dataset`, `tfds.as_numpy(...)`, a Grain or
      PyTorch loader) or a source with `__len__` and `__getitem__` (`tfds.data_source`): it yields
      batches, or with `batch_size` single samples, which are stacked leaf by leaf on a new first
      axis, the last batch ragged.
    * A callable without arguments that returns one of the above. It is called once per sweep, so
      that each sweep begins with fresh data; a generator can be read only once.

    An item (and a whole dataset in memory) becomes arguments as follows. An array is the one
    argument, the entries of a tuple or list are the arguments, and a dict is one argument.

    Arrays stay NumPy or JAX arrays. Other tensors and Python numbers become NumPy arrays. 64-bit
    NumPy values become 32-bit ones, as in JAX, unless `jax_enable_x64` is set. A source must not
    write into an array that it has already yielded.

    Args:
      ds: the dataset, in any of the forms above.
      batch_size: the number of samples that make a batch; None where `ds` yields batches.
      batch_nums: stop after this many batches, without reading further; None for all of `ds`.
      select: which part of an item the model takes. A key or an index picks one entry, which
        becomes arguments by the rule above; a tuple of keys or indices picks one argument each; a
        function maps the item to the model's inputs. What is not picked may be text: it is not
        converted.

    Returns:
      An iterator over tuples of arguments. All have one structure; sizes may vary.

    Raises:
      TypeError: `ds`, `batch_size`, `batch_nums` or `select` is of no usable type, or a leaf of a
        batch is not numeric.
      ValueError: `ds` is empty; samples or batches do not fit together; `select` names an entry
        that an item lacks; `batch_size` or `batch_nums` is not positive.
      Exception: whatever `ds` or `select` raise passes through, with a note that names the batch.

    Warns:
      UserWarning: `ds` ended before `batch_nums` batches.

    >>> import numpy as np
    >>> images, labels = np.zeros((5, 8, 8, 3), np.float32), np.arange(5)
    >>> [x.shape for (x,) in iterate(images, batch_size=2)]
    [(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)]
    >>> samples = ({"image": image, "label": label} for image, label in zip(images, labels))
    >>> [x.shape for (x,) in iterate(samples, batch_size=4, select="image")]
    [(4, 8, 8, 3), (1, 8, 8, 3)]
    """
    # Checked now, and not when the first batch is asked for.
    _check_count("batch_size", batch_size)
    _check_count("batch_nums", batch_nums)
    check_select(select)
    check_source(ds)
    return _checked_batches(ds, batch_size, batch_nums, select)


def num_batches(
    ds: Any,
    batch_size: int | None = None,
    batch_nums: int | None = None,
    *,
    select: Select = None,
) -> int | None:
    """Counts the batches that `iterate` will yield, where that is known without reading `ds`.

    Args:
      ds: the dataset, as for `iterate`. A callable is not called.
      batch_size: as for `iterate`.
      batch_nums: as for `iterate`.
      select: as for `iterate`.

    Returns:
      The number of batches; an upper bound, `batch_nums`, where the length of `ds` is unknown; None
      where that is None too.

    Raises:
      TypeError, ValueError: as `iterate`.

    >>> import numpy as np
    >>> num_batches(np.zeros((10, 3)), batch_size=4), num_batches(iter([1.0, 2.0]))
    (3, None)
    """
    _check_count("batch_size", batch_size)
    _check_count("batch_nums", batch_nums)
    check_select(select)
    check_source(ds)
    if is_in_memory(ds):
        samples = num_samples(ds, select)
        # In memory the number of samples is known without reading one.
        total = -(-samples // (batch_size or max(samples, 1)))
    else:
        items = num_items(ds)
        # A generator does not say how many it has.
        if items is None:
            return batch_nums
        total = -(-items // (batch_size or 1))
    return total if batch_nums is None else min(total, batch_nums)


def _checked_batches(
    ds: Any, batch_size: int | None, batch_nums: int | None, select: Select
) -> Iterator[Batch]:
    """Yields up to `batch_nums` batches, each checked against the first."""
    source = open_source(ds)
    checker = BatchChecker()
    # islice stops without asking for one batch more, which an endless or slow source would notice.
    for batch in itertools.islice(_batches(source, batch_size, select), batch_nums):
        checker.check(batch)
        yield batch

    if checker.count == 0:
        raise ValueError(empty_message(ds))
    if batch_nums is not None and checker.count < batch_nums:
        is_unsplit = batch_size is None and is_in_memory(source)
        hint = ": in memory it is one batch, unless batch_size splits it." if is_unsplit else "."
        warnings.warn(
            f"ds ended after {checker.count} of batch_nums={batch_nums} batches{hint}", stacklevel=2
        )


def _batches(source: Any, batch_size: int | None, select: Select) -> Iterator[Batch]:
    """Yields the batches of an opened source."""
    if is_in_memory(source):
        for index, arguments in enumerate(slice_in_memory(source, batch_size, select)):
            yield to_arrays(arguments, f"batch {index}")
    # What yields batches is taken as it comes.
    elif batch_size is None:
        for where, item in read_items(source, None):
            yield to_arrays(select_arguments(item, select, where), where)
    else:
        # Lazily, one batch at a time: a data set may be larger than memory.
        samples = (
            to_arrays(select_arguments(item, select, where), where)
            for where, item in read_items(source, batch_size)
        )
        for index in itertools.count():
            group = list(itertools.islice(samples, batch_size))
            if not group:
                return
            yield stack_samples(group, f"batch {index}")


def _check_count(name: str, value: int | None) -> None:
    """Refuses what is not None or a positive integer."""
    if value is None:
        return
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be a positive integer or None, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be a positive integer or None, got {value}")
