"""What is found in a model, found once: cached properties that other rooms add to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

Owner = TypeVar("Owner")
Key = ParamSpec("Key")
Found = TypeVar("Found")


def once(
    find: Callable[Concatenate[Owner, Key], Found],
) -> Callable[Concatenate[Owner, Key], Found]:
    """A pure function of an immutable owner whose results are kept with the owner.

    It is to a model, graph or binding what `functools.cached_property` is, for rooms that these do
    not know.  The results go when the owner goes.

    Args:
      find: a function of the owner and of hashable arguments; what it raises is not kept.

    Example:
      >>> import types
      >>> @once
      ... def doubled(owner, factor):
      ...     print("searching")
      ...     return 2 * factor * owner.size
      >>> box = types.SimpleNamespace(size=3)
      >>> doubled(box, 1), doubled(box, 1)
      searching
      (6, 6)
    """

    @functools.wraps(find)
    def found(owner: Owner, /, *args: Key.args, **kwargs: Key.kwargs) -> Found:
        # Beside the cached properties, which a frozen dataclass has in its `__dict__` too.
        kept: dict[Any, Found] = owner.__dict__.setdefault("_found_once", {})
        key = find, args, tuple(sorted(kwargs.items()))
        if key not in kept:
            kept[key] = find(owner, *args, **kwargs)
        return kept[key]

    return found
