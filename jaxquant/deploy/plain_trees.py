"""Trees of inputs and outputs without Flax's containers: in files there are none of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax


def plain_tree(tree: Any) -> Any:
    """The same leaves in the same order, in dicts where Flax has containers of its own.

    A state of `nnx.split` and a `FrozenDict` become dicts, an nnx variable its value.  So a decoder
    whose cache is such a state is called without Flax once it was saved; `nnx.to_pure_dict` makes
    the dict that it takes.

    >>> from flax.core import freeze
    >>> plain_tree((freeze({"cache": {"index": 0}}), 1))
    ({'cache': {'index': 0}}, 1)
    """

    def converted(node: Any) -> Any:
        if not _is_flax(node):
            return node
        if isinstance(node, Mapping):
            return {key: plain_tree(value) for key, value in node.items()}
        # A variable holds one array; what holds more is a container of its own.
        leaves = jax.tree.leaves(node)
        return leaves[0] if len(leaves) == 1 else node

    return jax.tree.map(converted, tree, is_leaf=_is_flax)


def with_lists(tree: Any) -> Any:
    """The same leaves in the same order, in lists where dicts have the keys 0, 1, 2, ...

    `nnx.List` gives such dicts, and `jax.export` has none of integer keys.

    >>> with_lists({"layers": {0: "a", 1: "b"}})
    {'layers': ['a', 'b']}
    """

    def converted(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        children = {key: with_lists(value) for key, value in node.items()}
        numbers = range(len(children))
        # True and 1 are one key to a dict; types tell them apart.
        is_list = all(type(key) is int for key in children) and set(children) == {*numbers}
        return [children[number] for number in numbers] if children and is_list else children

    return jax.tree.map(converted, tree, is_leaf=lambda node: isinstance(node, dict))


def plain_structure(structure: Any) -> Any:
    """The structure of `plain_tree` of a tree of the given structure."""
    numbers = range(structure.num_leaves)
    return jax.tree.structure(plain_tree(jax.tree.unflatten(structure, numbers)))


def _is_flax(node: Any) -> bool:
    return type(node).__module__.partition(".")[0] == "flax"
