"""Checks of single settings: each raises an error that says what was given and what is taken."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from jaxquant.graph.kinds import MEANINGS
from jaxquant.plan.rules import check_known


def check_flag(name: str, value: object) -> None:
    """Raise ValueError where an argument is neither True nor False."""
    # 1 and "false" would be true where they are read.
    if not isinstance(value, bool):
        raise ValueError(f"{name} is True or False, got {value!r}")


def check_path(name: str, path: object) -> None:
    """Raise where the path of a file is no path; None is for no file."""
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"{name} is the path of a file or None, got {path!r}")
    if path is not None and not os.fspath(path):
        raise ValueError(f"{name} is empty: give the path of a file, or None for no file")


def check_percent(value: Any) -> None:
    """Raise ValueError where a fraction of the values is none; a percentage gets a hint."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 < value <= 1:
        return
    # A percentage is the likely mistake: PaddleSlim's name says percent.
    hint = f"; {value!r} % is {value / 100:.6g}" if is_number and 1 < value <= 100 else ""
    raise ValueError(f"hist_percent is a fraction in (0, 1], such as 0.99999; got {value!r}{hint}")


def check_group_size(size: Any) -> None:
    """Raise ValueError where the size of groups is neither a positive integer nor None."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(
            f"group_size is how many weights share a scale, a positive integer, or None for "
            f"one scale a channel; got {size!r}"
        )


def check_kind(kind: object, valid: Sequence[str]) -> None:
    """As `check_known`; a word of JAX's, such as Dense, is answered with the kind that means it."""
    for name, meaning in MEANINGS.items():
        words = re.findall(r"\w+", meaning.lower())
        if kind not in valid and name in valid and str(kind).lower() in words:
            raise ValueError(f"quantizable_op_type: {kind!r} is not known; {name!r} is {meaning}")
    check_known("quantizable_op_type", kind, valid)
