"""From a flat mapping of names to arrays, as weight files hold it, to the variables of a model."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import ExperimentError

Variables = dict[str, Any]
Arrays = Mapping[str, np.ndarray]

SHOWN = 8  # names that an error message lists before it counts the rest


class WeightsError(ExperimentError):
    """A weight file that cannot be read or does not fit the model."""


class CutShortError(WeightsError):
    """A weight file whose end is missing.

    Attributes:
      arrays: those that are whole.
    """

    def __init__(self, message: str, arrays: Arrays) -> None:
        super().__init__(message)
        self.arrays = arrays


class Layout(NamedTuple):
    """How a framework names and stores the arrays of one layer.

    Attributes:
      suffixes: for each Flax leaf name, what follows the layer's name in the file; the first
        candidate that the file has is taken.
      convert: (array of the file, wanted shape) -> array in Flax's axis order.
      ignored: suffixes of arrays that no model needs.
    """

    suffixes: Mapping[str, tuple[str, ...]]
    convert: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    ignored: tuple[str, ...] = ()


class Naming(NamedTuple):
    """What a kind of weight file calls the layers of a network, and how it lays their arrays out.

    Attributes:
      layer: a Flax layer, such as "block3/expand/conv" -> the file's name for it.
      layout: of the framework that wrote the file.
    """

    layer: Callable[[str], str]
    layout: Layout

    def candidates(self, path: tuple[jax.tree_util.DictKey, ...]) -> list[str]:
        """The names under which the file may have the variable at a path of the tree."""
        _, *layers, leaf = (str(key.key) for key in path)
        layer = self.layer("/".join(layers))
        return [layer + suffix for suffix in self.layout.suffixes[leaf]]


def template(model: nn.Module, image_size: int) -> Variables:
    """The model's variables as shapes; computes nothing."""
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)


def random_variables(variables: Variables, seed: int = 0) -> Variables:
    """Variables of the given shapes that keep the activations of a network near one; no training.

    Kernels are normal with variance 2 / fan-in, BatchNorms leave what they get as it is.
    """
    rng = np.random.default_rng(seed)

    def fill(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key == "kernel":
            deviation = np.float32(np.sqrt(2 / math.prod(leaf.shape[:-1])))
            return deviation * rng.standard_normal(leaf.shape, np.float32)
        return np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)

    return jax.tree_util.tree_map_with_path(fill, variables)


def best_naming(variables: Variables, source: Arrays, namings: Sequence[Naming]) -> Naming:
    """The naming under which the file has the most of the variables."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]

    def found(naming: Naming) -> int:
        return sum(any(c in source for c in naming.candidates(path)) for path in paths)

    return max(namings, key=found)


def assemble(variables: Variables, source: Arrays, naming: Naming) -> Variables:
    """Fills a tree of shapes with the arrays of a file, as float32.

    Args:
      variables: the shapes of a model (see `template`).
      source: the file's names and arrays.
      naming: what the file calls them.

    Raises:
      WeightsError: naming every parameter that is missing or has another shape, and every array
        that the model has no place for.
    """
    problems: list[str] = []
    used: set[str] = set()

    def fill(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        candidates = naming.candidates(path)
        found = next((c for c in candidates if c in source), None)
        where = "/".join(str(key.key) for key in path[1:])
        if found is None:
            problems.append(f"{where}: missing (looked for {' and '.join(candidates)})")
            return np.zeros(leaf.shape, np.float32)
        used.add(found)
        array = naming.layout.convert(source[found], leaf.shape)
        if array.shape != leaf.shape:
            problems.append(f"{where}: shape {leaf.shape} expected, {found} gives {array.shape}")
        return np.ascontiguousarray(array, dtype=np.float32)

    filled = jax.tree_util.tree_map_with_path(fill, variables)
    unused = [k for k in source if k not in used and not k.endswith(naming.layout.ignored)]
    problems += [f"{name}: the model has no such parameter" for name in unused]
    if problems:
        raise WeightsError(
            f"the weights do not fit the model ({len(problems)} problems):\n  "
            + "\n  ".join(shortened(problems))
            + "\nIs this the file of another network, or of another version of it?"
        )
    return filled


def shortened(lines: list[str]) -> list[str]:
    """The first few of many lines, and how many there are beside them."""
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"... and {rest} more"]


def _from_torch(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim == 4:  # OIHW -> HWIO
        return array.transpose(2, 3, 1, 0)
    return array.T if array.ndim == 2 else array


def _from_keras(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.ndim == 4 and len(shape) == 4 and array.shape != shape and shape[2] == 1:
        height, width, channels, multiplier = array.shape  # a depthwise kernel
        return array.reshape(height, width, 1, channels * multiplier)
    if array.ndim == 4 and len(shape) == 2 and array.shape[:2] == (1, 1):
        return array[0, 0]  # a 1x1 convolution of a 1x1 image: a dense layer
    return array


TORCH = Layout(
    suffixes={
        "kernel": (".weight",),
        "scale": (".weight",),
        "bias": (".bias",),
        "mean": (".running_mean",),
        "var": (".running_var",),
    },
    convert=_from_torch,
    ignored=(".num_batches_tracked",),
)

KERAS = Layout(
    suffixes={
        "kernel": ("/kernel", "/depthwise_kernel"),
        "scale": ("/gamma",),
        "bias": ("/bias", "/beta"),
        "mean": ("/moving_mean",),
        "var": ("/moving_variance",),
    },
    convert=_from_keras,
)

# Variables that Flax itself saved, under our own names.
FLAX = Layout(
    suffixes={leaf: (f"/{leaf}",) for leaf in ("kernel", "scale", "bias", "mean", "var")},
    convert=lambda array, shape: array,
)
OUR_NAMES = Naming(lambda layer: layer, FLAX)
