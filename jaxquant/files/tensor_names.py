"""The names of tensors in a file: the keys of nested dicts, joined.

A name is a key of a dict, never a path on a disk, and never reads as one out of its folder.
"""

from __future__ import annotations

import re

from jaxquant.files.errors import FileError

_ESCAPE = re.compile("~(?![01])")
_FORBIDDEN = ("", ".", "..")


def join(parts: tuple[str, ...]) -> str:
    """The name of a tensor from the keys of nested dicts; "~" and "/" become "~0" and "~1".

    Raises:
      ValueError: a key would make a name that reads as a path out of its folder.
    """
    for part in parts:
        if part in _FORBIDDEN or not part.isprintable():
            raise ValueError(f"a parameter under the key {part!r} cannot be saved; rename it")
    return "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)


def split(name: str) -> tuple[str, ...]:
    """The keys of nested dicts from the name of a tensor; the inverse of `join`.

    Raises:
      FileError: `join` gives no such name.
    """
    parts = name.split("/")
    if any(part in _FORBIDDEN for part in parts) or not name.isprintable() or _ESCAPE.search(name):
        raise FileError(f"the tensor name {name[:100]!r} is not valid")
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)
