"""The warning of a quantized model whose weights take more room than those of the float model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax

from jaxquant.graph.trace import path_parts
from jaxquant.report.make import tree_bytes

_NAMED = 3
_WORTH = 1024  # bytes more that are worth a warning; the report has all of them


def warn_if_larger(params: Any, qparams: Mapping[str, Any]) -> None:
    """Warn where the stored weights have many more bytes than the parameters, and which grew.

    One parameter may be stored as several int8 weights, or as one that is larger than itself, the
    product of two factors say.

    Args:
      params: the float parameters.
      qparams: the arrays of the int8 model.
    """
    before, after = {}, {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = path_parts(key_path)
        name = "/".join(path)
        before[name], after[name] = tree_bytes(leaf), tree_bytes(_stored(qparams, path))
    # Scales and rounding up to whole bytes always cost a little; that is not worth a word.
    if sum(after.values()) < sum(before.values()) + _WORTH:
        return
    # By what they grew, the largest first.
    grown = sorted(before, key=lambda name: before[name] - after[name])[:_NAMED]
    shown = "; ".join(
        f"{name} ({before[name]:,} bytes) as {_spell(_stored(qparams, tuple(name.split('/'))))}"
        for name in grown
        if after[name] > before[name]
    )
    warnings.warn(
        f"the quantized model's weights have {sum(after.values()):,} bytes, and the float model's "
        f"parameters {sum(before.values()):,}. What sites multiply by is stored, not what it is "
        f"computed from: {shown}. skip=(...) on the sites that read them, or hand their weights "
        "over computed",
        stacklevel=5,  # the caller of the public function, behind its check of keywords
    )


def _stored(qparams: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What is stored of a parameter: an array, a dict of arrays, or () for nothing."""
    found: Any = qparams["params"]
    for part in path:
        if not isinstance(found, Mapping) or part not in found:
            return ()
        found = found[part]
    return found


def _spell(stored: Any) -> str:
    leaves = jax.tree_util.tree_flatten_with_path(stored)[0]
    return ", ".join(
        f"{path_parts(path)[-1]} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves
    )
