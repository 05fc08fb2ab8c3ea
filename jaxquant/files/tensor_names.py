"""The names of tensors in a file: the keys of nested dicts, joined.

A name is a key of a dict, never a path on a disk, and never reads as one out of its folder.
"""

from __future__ import annotations

import re

from jaxquant.files.errors import FileError

_ESCAPE = re.compile("~(?![01])")
_FORBIDDEN = ("", ".", "..")
MAX_PARTS = 64  # keys in a name: trees are walked by functions that call themselves
MAX_CHARACTERS = 4096


def join(parts: tuple[str, ...]) -> str:
    """The name of a tensor from the keys of nested dicts; "~" and "/" become "~0" and "~1".

    Raises:
      ValueError: a key would make a name that reads as a path out of its folder, or the name is
        too long or too deep.
    """
    for part in parts:
        if part in _FORBIDDEN or not part.isprintable():
            raise ValueError(f"a parameter under the key {part!r} cannot be saved; rename it")
    # As JSON pointers do; "~" first, or the escapes would be escaped.
    name = "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts)
    if _is_too_large(name):
        raise ValueError(
            f"the parameter {name[:100]!r}... has {len(parts)} keys of {len(name)} characters on "
            f"the way to it; at most {MAX_PARTS} and {MAX_CHARACTERS} can be saved"
        )
    return name


def split(name: str) -> tuple[str, ...]:
    """The keys of nested dicts from the name of a tensor; the inverse of `join`.

    Raises:
      FileError: `join` gives no such name.
    """
    if _is_too_large(name):
        raise FileError(f"the tensor name {name[:100]!r}... is too long or too deep")
    parts = name.split("/")
    if any(part in _FORBIDDEN for part in parts) or not name.isprintable() or _ESCAPE.search(name):
        raise FileError(f"the tensor name {name[:100]!r} is not valid")
    # In the reverse order of `join`.
    return tuple(part.replace("~1", "/").replace("~0", "~") for part in parts)


def _is_too_large(name: str) -> bool:
    return len(name) > MAX_CHARACTERS or name.count("/") >= MAX_PARTS
