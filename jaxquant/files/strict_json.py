"""JSON from a file that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

from jaxquant.files.errors import FileError


def parse_json(text: bytes, part: str) -> dict[str, Any]:
    """A JSON object, without the liberties that Python's reader takes.

    Raises:
      FileError: it is not JSON in UTF-8, not an object, or has a key twice.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise FileError(f"the {part} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise FileError(f"the {part} is damaged: it is no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")
