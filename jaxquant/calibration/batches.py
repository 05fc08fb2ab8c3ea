"""Batches: made of arrays, stacked from samples, and checked against the first one."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array
Batch: TypeAlias = tuple[Any, ...]
"""The arguments of `apply_fn` after params: a tuple of pytrees of arrays."""


def to_arrays(arguments: Batch, where: str) -> Batch:
    """Makes every leaf a NumPy or JAX array of a dtype that JAX computes with.

    Args:
      arguments: pytrees whose leaves are arrays, tensors or Python numbers.
      where: names the batch, or the sample of a batch, in errors.

    Returns:
      The same tree. JAX arrays are returned as they are; NumPy arrays too, unless their dtype is a
      64-bit one that JAX would narrow.

    Raises:
      TypeError: a leaf is text, an object, or cannot be converted.

    >>> to_arrays((np.zeros(2), 7), "batch 0")
    (array([0., 0.], dtype=float32), array(7, dtype=int32))
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _to_array(leaf, _leaf_name(path), where), arguments
    )


def stack_samples(samples: Sequence[Batch], where: str) -> Batch:
    """Stacks samples into a batch, leaf by leaf, on a new first axis.

    Args:
      samples: at least one, each with leaves `[...]` from `to_arrays`.
      where: names the batch in errors.

    Returns:
      The same tree with leaves `[len(samples), ...]`; a leaf is a JAX array where a sample's is.

    Raises:
      ValueError: a sample differs from the first in structure, shape or dtype.

    >>> stack_samples([(np.float32(1),), (np.float32(2),)], "batch 0")
    (array([1., 2.], dtype=float32),)
    """
    for index, sample in enumerate(samples):
        problem = _difference(sample, samples[0], sizes=True)
        if problem:
            raise ValueError(
                f"{where}: the samples cannot be stacked, because sample {index} differs from "
                f"sample 0: {problem}. Make the samples alike (resize, crop or pad them), or let "
                "ds yield batches and leave batch_size out."
            )
    # Leaf by leaf: a sample is a pytree.
    return jax.tree.map(_stack, *samples)


class BatchChecker:
    """Checks that batches fit together: one structure, with sizes that may vary.

    >>> checker = BatchChecker()
    >>> checker.check((np.zeros((4, 3)),))
    >>> checker.check((np.zeros((2, 3)),))
    >>> checker.count
    2
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: Batch | None = None

    def check(self, batch: Batch) -> None:
        """Counts a batch and compares it with the first.

        Args:
          batch: arguments from `to_arrays` or `stack_samples`, with leaves `[B, ...]`.

        Raises:
          ValueError: the batch has no leaf or no sample, or differs from the first in structure, in
            a dtype, or in a number of axes.
        """
        where = f"batch {self.count}"
        # With paths, since messages name the input.
        leaves = jax.tree_util.tree_leaves_with_path(batch)
        if not leaves:
            raise ValueError(f"{where} of ds holds no array: {batch!r}")
        for path, leaf in leaves:
            if leaf.ndim and leaf.shape[0] == 0:
                raise ValueError(
                    f"{where} of ds is empty: {_leaf_name(path)} is {_spell(leaf)}. Leave it out."
                )
        # Shapes may vary with the texts; the structure and the dtypes are the model's signature.
        if self._first is None:
            self._first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        if problem := _difference(batch, self._first, sizes=False):
            raise ValueError(
                f"{where} of ds differs from batch 0: {problem}. Only sizes may vary between "
                "batches, where the model takes them."
            )
        self.count += 1


def _to_array(leaf: Any, name: str, where: str) -> Array:
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(
            f"{where} of ds: {name} is being traced: calibration runs outside jit, on arrays "
            "(the quantized model itself may be jitted)"
        )
    if isinstance(leaf, jax.Array):
        return leaf
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise TypeError(
            f"{where} of ds: {name} is a {type(leaf).__name__} that cannot be made a NumPy array "
            f"({error}). Convert it in ds, or pick other inputs with select=."
        ) from error
    # bfloat16 and the like are numbers to JAX, though NumPy calls them void.
    is_numeric = jax.dtypes.issubdtype(array.dtype, np.number) or array.dtype == np.bool_
    if not is_numeric:
        raise TypeError(
            f"{where} of ds: {name} is not numeric: {_shorten(leaf)} of type "
            f"{type(leaf).__name__}, dtype {array.dtype}. Pick the model's inputs with select=, "
            "such as select='image', select=0 or select=lambda item: item['image']."
        )
    dtype = jax.dtypes.canonicalize_dtype(array.dtype).newbyteorder("=")  # JAX takes no other
    return array.astype(dtype, copy=False)


def _stack(*leaves: Array) -> Array:
    is_jax = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.stack(leaves) if is_jax else np.stack(leaves)


def _difference(tree: Any, expected: Any, *, sizes: bool) -> str | None:
    """Says where two trees of arrays differ: in structure, dtypes, ranks and, if asked, sizes."""
    # The structure first: leaves of different trees do not correspond.
    structures: tuple[Any, Any] = jax.tree.structure(tree), jax.tree.structure(expected)
    if structures[0] != structures[1]:
        return f"{_spell_tree(tree)} instead of {_spell_tree(expected)}"
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), wanted in zip(leaves, jax.tree.leaves(expected)):
        is_alike = (
            leaf.dtype == wanted.dtype
            and leaf.ndim == wanted.ndim
            and (not sizes or leaf.shape == wanted.shape)
        )
        if not is_alike:
            return f"{_leaf_name(path)} is {_spell(leaf)} instead of {_spell(wanted)}"
    return None


def _leaf_name(path: jax.tree_util.KeyPath) -> str:
    return f"inputs{jax.tree_util.keystr(path)}"


def _spell(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _spell_tree(tree: Any) -> str:
    return str(jax.tree.map(_spell, tree)).replace("'", "")


def _shorten(leaf: Any) -> str:
    text = repr(leaf)
    return text if len(text) <= 60 else f"{text[:60]}…"
