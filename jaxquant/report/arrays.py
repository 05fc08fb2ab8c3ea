"""The arrays of a model at a glance: a table instead of their values."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

import jax

from jaxquant.graph import ir
from jaxquant.graph.trace import path_name
from jaxquant.report.make import tree_bytes
from jaxquant.report.table import html_table, text_table

_RIGHT = (False, False, True, True)
_SHOWN = 40  # rows of the text


@dataclasses.dataclass(frozen=True, repr=False)
class Arrays:
    """What `jaxquant.describe` returns; prints as a table, in a notebook as HTML.

    Attributes:
      rows: (path, dtype, shape, bytes) of every array.
    """

    rows: Sequence[tuple[str, str, str, int]]

    def __str__(self) -> str:
        more = len(self.rows) - _SHOWN
        lines = [text_table(self._cells(_SHOWN), _RIGHT)]
        lines += [f"and {more} more; .rows has all"] if more > 0 else []
        return "\n".join([*lines, "", self._footer()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = html_table(self._cells(len(self.rows)), _RIGHT)
        return f"{table}<pre>{html.escape(self._footer())}</pre>"

    def _cells(self, shown: int) -> list[list[str]]:
        lines = [[path, dtype, shape, f"{size:,}"] for path, dtype, shape, size in self.rows]
        return [["array", "dtype", "shape", "bytes"], *lines[:shown]]

    def _footer(self) -> str:
        return f"{len(self.rows)} arrays, {sum(row[3] for row in self.rows):,} bytes."


def describe(tree: Any) -> Arrays:
    """The arrays of `qparams`, or of any pytree, as a table of paths, dtypes, shapes and bytes.

    Shown by itself a dict of arrays floods a notebook with numbers.

    Example:
      >>> import jax.numpy as jnp, jaxquant
      >>> jaxquant.describe({"a": {"int8": jnp.zeros((3, 4), jnp.int8)}, "b": jnp.zeros(2)})
      array   dtype    shape  bytes
      ------  -------  -----  -----
      a/int8  int8      3, 4     12
      b       float32      2      8
      <BLANKLINE>
      2 arrays, 20 bytes.
    """
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        struct = ir.struct(leaf)
        shape = ", ".join(map(str, struct.shape))
        rows.append((path_name(path), str(struct.dtype), shape, tree_bytes(leaf)))
    return Arrays(tuple(rows))
