"""Tables as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence


def text_table(cells: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Columns side by side; the first row is the head, the last column is never padded.

    Args:
      cells: the rows.
      right: which columns are numbers, set to the right.

    Example:
      >>> print(text_table([["site", "dB"], ["a", "7.5"]], [False, True]))
      site   dB
      ----  ---
      a     7.5
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
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
