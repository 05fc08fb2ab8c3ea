"""JSON from a file that nobody vouches for.

Python's reader makes some thirty bytes of objects from one byte of text, and takes minutes over
tens of millions of lists, so a text is measured before it is parsed.  Nothing that this package
writes comes near the limits.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from jaxquant.files.errors import FileError

MAX_BYTES = 2**25
MAX_VALUES = 2**21  # list items, and keys with their values
MAX_DEPTH = 64  # of lists and objects in each other
_MAX_DIGITS = 20  # of an integer: more than 64 bits need


def dump_json(value: Any, part: str) -> bytes:
    """Compact JSON that `parse_json` reads.

    Raises:
      ValueError: the value is larger or deeper than what `parse_json` takes, or has a NaN or
        infinity in it.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    if problem := _measure(text):
        raise ValueError(f"the {part} cannot be saved: {problem}")
    return text


def parse_json(text: bytes, part: str) -> dict[str, Any]:
    """A JSON object, without the liberties that Python's reader takes.

    Raises:
      FileError: it is not JSON in UTF-8, not an object, has a key twice or a number that is not
        finite, or is too large or too deep.
    """
    if problem := _measure(text):
        raise FileError(f"the {part} is refused: {problem}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        if b"\\ud" in text.lower():  # half of a character can be written so, and not be printed
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise FileError(f"the {part} is damaged: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise FileError(f"the {part} is damaged: it is no JSON object")
    return value


def _measure(text: bytes) -> str:
    """What is too large about a text, "" for nothing; takes a moment whatever the text is."""
    if len(text) > MAX_BYTES:
        return f"it has {len(text)} bytes of JSON; at most {MAX_BYTES} are read"
    # Without escaped characters every quotation mark opens or closes a string.
    # Escaped backslashes first: behind one of them a quotation mark is a plain one.
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(plain, np.uint8)
    # Odd after an opening mark, even after a closing one; eight bits keep the parity.
    in_string = np.cumsum(characters == ord('"'), dtype=np.uint8) & 1
    outside = characters[in_string == 0]
    opens = (outside == ord("[")) | (outside == ord("{"))
    closes = (outside == ord("]")) | (outside == ord("}"))
    values = np.count_nonzero(opens) + np.count_nonzero(outside == ord(","))
    # Commas and brackets outside of strings are as many as there are values, or more.
    if values > MAX_VALUES:
        return f"it has {values} values; at most {MAX_VALUES} are read"
    depth = np.cumsum(opens.view(np.int8) - closes.view(np.int8), dtype=np.int32)
    if depth.size and depth.max() > MAX_DEPTH:
        return f"it is nested {depth.max()} deep; at most {MAX_DEPTH} levels are read"
    return ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(text)} digits")
    return int(text)
