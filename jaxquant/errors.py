"""Parts of error messages that several modules share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def nearest(value: str, names: Sequence[str], n: int = 5) -> str:
    """The end of an error message: the names closest to `value`, or all of them if few."""
    # Compared without regard to capitals, shown with them.
    lowered = {name.lower(): name for name in names}
    close = [lowered[k] for k in difflib.get_close_matches(value.lower(), lowered, n, 0.5)]
    if close:
        return f"; nearest: {', '.join(close)} (of {len(names)})"
    shown = ", ".join(names[:20])
    return f"; valid: {shown}" + (f" and {len(names) - 20} more" if len(names) > 20 else "")
