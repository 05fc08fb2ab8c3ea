"""Pytree containers by the name under which they are registered with `jax.export`."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from jax._src.export import _export


def container_name(kind: type, auxiliary: Any) -> tuple[str, str]:
    """The name under which a pytree container is registered with `jax.export`, and its data.

    Raises:
      ValueError: it is not registered.
    """
    if kind not in _export.serialization_registry:
        raise ValueError(
            f"the model's inputs or outputs are in a {kind.__name__}, which cannot be saved. Let "
            "apply_fn take and return tuples, lists and dicts, or register the class with "
            "jax.export.register_pytree_node_serialization"
        )
    name, serialize = _export.serialization_registry[kind]
    # Base64, since JSON holds text alone.
    return name, base64.b64encode(bytes(serialize(auxiliary))).decode()


def container(name: str, auxiliary: str, children: Sequence[Any]) -> Any:
    """The container that `container_name` named.

    Raises:
      ValueError: it is not registered, or its data is damaged.
    """
    if name not in _export.deserialization_registry:
        raise ValueError(
            f"the model's inputs or outputs are in a {name[:60]!r}, which is not registered here; "
            "call jax.export.register_pytree_node_serialization before loading"
        )
    _, deserialize, from_children = _export.deserialization_registry[name]
    try:
        data = deserialize(base64.b64decode(auxiliary, validate=True))
        return from_children(data, tuple(children))
    except Exception as error:  # whatever the registered functions raise
        raise ValueError(f"the container {name[:60]!r} is damaged: {error!r}") from None
