"""Tables as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def text_table(
    cells: Sequence[Sequence[str]], right: Sequence[bool], width: int | None = None
) -> str:
    """Columns side by side; the first row is the head, the last column is never padded.

    Args:
      cells: the rows.
      right: which columns are numbers, set to the right.
      width: characters that a line should have: long names in the first column lose their middle
        for it.  None for no limit.

    Example:
      >>> print(text_table([["site", "dB"], ["a", "7.5"]], [False, True]))
      site   dB
      ----  ---
      a     7.5
    """
    if width is not None:
        cells = _fitted(cells, width)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # The last column may be long text: padding it would only widen the lines.
    if not right[-1]:
        widths[-1] = len(cells[0][-1])
    lines = [
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


_LEAST = 20  # characters of a name, which are needed to tell it from others


def _fitted(cells: Sequence[Sequence[str]], width: int) -> list[Sequence[str]]:
    """The cells with the names of the first column as short as lines of a width need them."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    names = min(widths[0], max(_LEAST, width - sum(size + 2 for size in widths[1:])))
    return [[_shortened(name, names), *others] for name, *others in cells]


def _shortened(name: str, length: int) -> str:
    """A name without its middle: what tells layers apart is at its ends."""
    if len(name) <= length:
        return name
    head = (length - 1) // 3
    return f"{name[:head]}…{name[len(name) - (length - 1 - head) :]}"


def html_table(
    cells: Sequence[Sequence[str]], right: Sequence[bool], dim: Sequence[bool] = ()
) -> str:
    """The same as an HTML table that scrolls where it is long.

    Args:
      cells, right: as for `text_table`.
      dim: which rows below the head are of less interest.

    Example:
      >>> "a&lt;b</td>" in html_table([["site"], ["a<b"]], [False])
      True
    """
    head = "".join(f"<th>{html.escape(text)}</th>" for text in cells[0])
    body = []
    for number, line in enumerate(cells[1:]):
        style = ' style="opacity:0.6"' if number < len(dim) and dim[number] else ""
        row = "".join(
            f'<td style="text-align:{"right" if is_right else "left"}">{html.escape(text)}</td>'
            for text, is_right in zip(line, right, strict=True)
        )
        body.append(f"<tr{style}>{row}</tr>")
    return (
        '<div style="max-height:30em;overflow:auto">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
