"""The arrays of the layers of a scan as one: stacked along a leading axis."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxquant.plan import layout


def stack_layers(
    layers: Sequence[Mapping[str, Any]], shared: Collection[tuple[str, ...]]
) -> dict[str, Any]:
    """The arrays of several layers along a leading axis.

    Args:
      layers: nested dicts; a bias that some layers lack is zero there.
      shared: the paths of arrays that all layers have in common, of which there is one.
    """
    flat = [dict(_flat(layer)) for layer in layers]
    found: dict[str, Any] = {"params": {}, "sites": {}, "tensors": {}}
    for path, example in {path: x for each in flat for path, x in each.items()}.items():
        if path in shared:
            layout.put(found, path, example)
            continue
        # A layer without an array has zeros: one program reads it in all layers.
        there = [each.get(path, np.zeros_like(example)) for each in flat]
        layout.put(found, path, np.stack(there))
    return found


def _flat(tree: Mapping[str, Any], head: tuple[str, ...] = ()) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*head, key))
        else:
            yield (*head, key), value
