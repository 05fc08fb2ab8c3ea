"""`qparams` as named arrays, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxquant.files import tensor_names
from jaxquant.files.errors import FileError
from jaxquant.jax_shim import prng
from jaxquant.run.qapply import QuantizedApply

ROOTS = ("params", "sites", "tensors")


def plain(qparams: Mapping[str, Any], qapply: Any) -> dict[str, Any]:
    """The `qparams` of a `qapply` as a nested dict of NumPy arrays, as they are saved.

    Raises:
      ValueError: they do not belong together, or an entry cannot be saved.
      TypeError: `qapply` is another function.
    """
    if not isinstance(qapply, QuantizedApply):
        raise TypeError(
            "qapply is what jaxquant.quant_post or load_quantized_model returned, got "
            f"{type(qapply).__name__}; the order is the path, qparams, qapply"
        )
    qapply.check(qparams)
    # Packed weights belong to this machine's kernels.
    return unflatten(flatten({k: v for k, v in qparams.items() if k != "packed"}))


def flatten(qparams: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `qparams` by name: the keys on the way to them, joined by "/".

    Raises:
      ValueError: an entry cannot be saved; the message names it.
    """
    return {tensor_names.join(path): _array(path, leaf) for path, leaf in _walk(qparams, ())}


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The nested dict that `flatten` was given.

    Raises:
      FileError: a name is another's folder, or is not under params, sites or tensors.
    """
    tree: dict[str, Any] = {root: {} for root in ROOTS}
    for name, array in arrays.items():
        *folders, last = tensor_names.split(name)
        if not folders or folders[0] not in ROOTS:
            raise FileError(f"the tensor {name!r} is not under {', '.join(ROOTS)}")
        place = tree
        for folder in folders:
            # Names come from a file: a tensor inside another one has no place in a dict.
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise FileError(f"the tensor {name!r} is inside of another one")
        if last in place:
            raise FileError(f"the tensor {name!r} is there twice")
        place[last] = array
    return tree


def _walk(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ValueError(f"qparams has the key {key!r} at {'/'.join(path)!r}, not a string")
        yield from _walk(value, (*path, key))


def _array(path: tuple[str, ...], leaf: Any) -> np.ndarray:
    if not hasattr(leaf, "dtype") or prng.is_key_dtype(leaf.dtype):
        raise ValueError(
            f"qparams[{'/'.join(path)!r}] is {getattr(leaf, 'dtype', type(leaf).__name__)}, not an "
            "array of numbers; it cannot be saved"
        )
    return np.asarray(jax.device_get(leaf))
