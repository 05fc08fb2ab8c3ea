"""The progress bar of a sweep over the data."""

import functools
import sys
import warnings
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from jaxquant.extras import how_to_install

T = TypeVar("T")


def progress_bar(
    iterable: Iterable[T],
    total: int | None,
    description: str,
    enabled: bool = True,
    unit: str = "batch",
) -> Generator[T, None, None]:
    """Shows the batches done, the rate and the time left while an iterable is read.

    The bar is drawn by `tqdm` (the extra `progress`), in a terminal and in a notebook. Without tqdm
    one line on stderr says so, once per process, and the reading goes on without a bar.

    The bar closes when the iterable ends or raises. Where the code that consumes it may raise, wrap
    it in `contextlib.closing`, so that the bar is closed before the error is shown.

    Args:
      iterable: what is read.
      total: its length, or None where that is unknown: then the bar shows no time left.
      description: the text before the bar.
      enabled: False for no bar.
      unit: what an item is called.

    Yields:
      The items. One counts as done when the next one is asked for.

    >>> import contextlib
    >>> with contextlib.closing(progress_bar([1, 2], 2, "calibrate", enabled=False)) as batches:
    ...     print(sum(batches))
    3
    """
    tqdm = _find_tqdm() if enabled else None
    if tqdm is None:
        yield from iterable
        return
    with tqdm(total=total, desc=description, unit=unit, dynamic_ncols=True) as bar:
        for item in iterable:
            yield item
            bar.update()


def _find_tqdm() -> Callable[..., Any] | None:
    """Imports tqdm, or says that it is missing."""
    with warnings.catch_warnings():
        # In a notebook without ipywidgets tqdm falls back to a text bar, and warns that it does.
        warnings.simplefilter("ignore")
        try:
            from tqdm.auto import tqdm
        except ImportError:
            _say_once(
                "jaxquant: no progress bar, because tqdm is not installed: "
                f"{how_to_install('progress')}; or pass progress=False."
            )
            return None
    return tqdm


@functools.cache
def _say_once(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
