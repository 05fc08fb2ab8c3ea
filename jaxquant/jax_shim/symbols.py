"""Symbolic sizes, as `jax.export` has them in shapes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def constraints(inputs: Any) -> tuple[str, ...]:
    """What is assumed of the symbolic sizes in a tree of shapes: "s <= 512", sorted."""
    sizes = [size for leaf in jax.tree.leaves(inputs) for size in leaf.shape]
    scopes = {id(s.scope): s.scope for s in sizes if jax.export.is_symbolic_dim(s)}
    # `jax.export` has no public way to ask for them.
    found = {c.debug_str for scope in scopes.values() for c in scope._explicit_constraints}
    return tuple(sorted(found))


def size_dtype() -> Any:
    """The dtype of a symbolic size as a value."""
    return jax.dtypes.canonicalize_dtype(np.int64)
