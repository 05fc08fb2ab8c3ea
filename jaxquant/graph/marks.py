"""How the path of a parameter that is cut tells of its layers: "a[4:12]/kernel"."""

from __future__ import annotations

import re

_MARK = re.compile(r".*(\[\d+(?::\d+)?\])(?:/[^/]*)?")


def mark(start: int, stop: int) -> str:
    """How names tell of a segment: "[4:12]", of one layer "[3]"."""
    return f"[{start}]" if stop == start + 1 else f"[{start}:{stop}]"


def mark_of(path: str, length: int) -> str:
    """The mark in the path of a parameter that is cut, of so many layers; "" in another one."""
    match = _MARK.fullmatch(path)
    if match is None:
        return ""
    start, colon, stop = match[1][1:-1].partition(":")
    size = int(stop) - int(start) if colon else 1
    # "[3]" may be a list's index in a path: only a size that fits is a mark.
    return match[1] if size == length else ""


def unmarked(path: str, length: int) -> str:
    """The path of the parameter that one of so many layers was cut from.

    Example:
      >>> unmarked("a[4:12]/kernel", 8), unmarked("a[4:12]/kernel", 3)
      ('a/kernel', 'a[4:12]/kernel')
    """
    head, found, tail = path.rpartition(mark_of(path, length) or path)
    return head + tail if found != path else path
