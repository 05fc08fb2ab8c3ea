"""Which part of an item of a dataset are the model's inputs: the `select` argument."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

Key: TypeAlias = str | int
Select: TypeAlias = Key | Sequence[Key] | Callable[[Any], Any] | None


def select_arguments(item: Any, select: Select, where: str) -> tuple[Any, ...]:
    """Picks from an item the tuple of arguments that `apply_fn` takes after params.

    Args:
      item: what the dataset gave: an array, or a tuple, list or dict of arrays, nested or not.
      select: as for `iterate`.
      where: names the item in errors.

    Returns:
      The arguments.

    Raises:
      ValueError: `select` names an entry that the item lacks.

    >>> select_arguments({"image": 1.0, "label": 3}, "image", "batch 0")
    (1.0,)
    >>> select_arguments((1.0, 3), None, "batch 0")
    (1.0, 3)
    """
    if select is None:
        return _as_arguments(item)
    if callable(select):
        try:
            return _as_arguments(select(item))
        except Exception as error:
            # The error is the user's own: where it came from is all that is added.
            error.add_note(f"Raised by select in {where} of ds, on {_outline(item)}.")
            raise
    if isinstance(select, str | int):
        return _as_arguments(_entry(item, select, where))
    return tuple(_as_tree(_entry(item, key, where)) for key in select)


def check_select(select: Select) -> None:
    """Refuses a `select` that is not None, a key, a non-empty sequence of keys or a function.

    Raises:
      TypeError: it is anything else.

    >>> check_select(("image", "mask"))
    """
    if select is None or callable(select):
        return
    keys = select if isinstance(select, Sequence) and not isinstance(select, str) else (select,)
    # True is an int, and would silently be index 1.
    if not keys or not all(isinstance(k, str | int) and not isinstance(k, bool) for k in keys):
        raise TypeError(
            "select must be a key or index of the items of ds, a non-empty tuple of those, "
            f"or a function of an item; got {select!r}"
        )


def _as_arguments(item: Any) -> tuple[Any, ...]:
    """The rule of `iterate`: the entries of a tuple or list are arguments, anything else is one."""
    # A tuple with a model's inputs, most likely (image, label): `select` says otherwise.
    tree = _as_tree(item)
    return tuple(tree) if isinstance(tree, tuple | list) else (tree,)


def _as_tree(item: Any) -> Any:
    """Turns a mapping that JAX does not know as a pytree, such as `numpy.load`'s, into a dict."""
    is_unknown = isinstance(item, Mapping) and jax.tree_util.all_leaves([item])
    return dict(item) if is_unknown else item


def _entry(item: Any, key: Key, where: str) -> Any:
    if isinstance(item, Mapping):
        if key in item:
            return item[key]
    elif isinstance(item, tuple | list):
        if isinstance(key, int) and -len(item) <= key < len(item):
            return item[key]
        # Named tuples have names beside their places.
        if key in getattr(item, "_fields", ()):
            return getattr(item, str(key))
    raise ValueError(f"select={key!r} does not fit {where} of ds, which is {_outline(item)}")


def _outline(item: Any) -> str:
    if isinstance(item, Mapping):
        return f"a {type(item).__name__} with the keys {list(item)}"
    if fields := getattr(item, "_fields", None):
        return f"a {type(item).__name__} with the fields {list(fields)}"
    if isinstance(item, tuple | list):
        return f"a {type(item).__name__} of {len(item)} entries: select an index below {len(item)}"
    return f"a single {type(item).__name__}, without entries to select from"
