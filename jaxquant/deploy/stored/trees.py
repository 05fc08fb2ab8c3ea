"""The structure of a pytree as plain data."""

from __future__ import annotations

from typing import Any

import jax

from jaxquant.jax_shim import containers

_MAX_DEPTH = 16


def encode_tree(tree: Any) -> Any:
    """A `jax.tree_util.PyTreeDef` as what JSON has.

    Raises:
      ValueError: a container is none of tuple, list, dict and those that are registered with
        `jax.export`; or is too deep in others.
    """
    return _encode(tree, 0)


def decode_tree(data: Any) -> Any:
    """The `PyTreeDef` that `encode_tree` was given.

    Raises:
      ValueError: it is damaged, or has a container that is not registered here.
    """
    return jax.tree.structure(_template(data, 0))


def _encode(tree: Any, depth: int) -> Any:
    node = tree.node_data()
    if node is None:
        return "leaf"
    kind, auxiliary = node
    if depth >= _MAX_DEPTH:
        raise ValueError(f"the model's inputs or outputs are {depth} containers deep; too many")
    parts = [_encode(child, depth + 1) for child in tree.children()]
    if kind in (tuple, list):
        return {kind.__name__: parts}
    if kind is type(None):
        return None
    # A key of another type would come back as another one from JSON.
    if kind is dict and all(type(key) in (str, int, bool) for key in auxiliary):
        return {"dict": [list(pair) for pair in zip(auxiliary, parts, strict=True)]}
    # Classes that JAX was told of are stored by name, of those that are known to be safe.
    name, extra = containers.container_name(kind, auxiliary)
    return {"registered": [name, extra, parts]}


def _template(data: Any, depth: int) -> Any:
    if data is None:
        return None
    if data == "leaf":
        # Any leaf will do: the structure alone is kept.
        return 0
    if depth >= _MAX_DEPTH or not isinstance(data, dict) or len(data) != 1:
        raise ValueError("the structure of inputs or outputs is damaged")
    # One key, the kind; anything else was not written here.
    ((kind, parts),) = data.items()
    if kind in ("tuple", "list") and isinstance(parts, list):
        return {"tuple": tuple, "list": list}[kind](_template(x, depth + 1) for x in parts)
    if kind == "dict" and isinstance(parts, list):
        if not all(isinstance(p, list) and len(p) == 2 for p in parts):
            raise ValueError("a dict of inputs or outputs is damaged")
        if not all(type(key) in (str, int, bool) for key, _ in parts):
            raise ValueError("a dict of inputs or outputs has a key that is no text or number")
        return {key: _template(part, depth + 1) for key, part in parts}
    if kind == "registered" and isinstance(parts, list) and len(parts) == 3:
        name, extra, children = parts
        if isinstance(name, str) and isinstance(extra, str) and isinstance(children, list):
            made = [_template(child, depth + 1) for child in children]
            return containers.container(name, extra, made)
    raise ValueError("the structure of inputs or outputs is damaged")
