"""What the tests of loops compare."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

LAYER = re.compile(r"\blayers[_/](\d+)")  # of linen, of nnx


def shapes(tree: Any) -> Any:
    """The arrays' shapes and dtypes, to quantize without measuring on values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def sqnr(reference: Any, value: Any) -> float:
    """In dB."""
    reference, value = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((reference**2).sum() / ((reference - value) ** 2).sum()))


def flat(qparams: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Path -> array."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(qparams)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves
    }


def stacked(unrolled: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What `flat` tells of a model with a loop over `layers_0`, ... with the layers stacked."""
    found = flat(unrolled)
    layers: dict[str, dict[int, np.ndarray]] = {}
    rest = {}
    for path, array in found.items():
        match = LAYER.search(path)
        if match:
            name = LAYER.sub("layers", path)
            layers.setdefault(name, {})[int(match[1])] = array
        else:
            rest[path] = array
    return {**rest, **{name: np.stack([x[i] for i in range(len(x))]) for name, x in layers.items()}}


def assert_same_numbers(
    found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    """Bit for bit, and no more and no fewer."""
    assert sorted(found) == sorted(expected)
    for path, array in expected.items():
        assert found[path].dtype == array.dtype, path
        np.testing.assert_array_equal(found[path], array, err_msg=path)
