"""Masks of padding, the argument `mask`: which positions nobody reads, so that none is counted.

The user names the mask among the model's inputs, or gives a function that makes it of them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.observed import Observed
from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.positions import Positions, RealIn, all_entries, find_positions

Key: TypeAlias = str | int
Maker: TypeAlias = Key | Callable[..., Any]
Mask: TypeAlias = Maker | Mapping[Key, Maker] | None

_FUNCTION = "a function"


@dataclasses.dataclass(frozen=True)
class Padding:
    """The masks of a model's inputs.

    Attributes:
      masks: for each mask, which inputs have its positions (None for all that have its shape in
        front), and where it comes from: the key or index of an input, or a function of all.
    """

    masks: tuple[tuple[Key | None, Maker], ...]

    @staticmethod
    def of(mask: Mask) -> Padding | None:
        """What the argument `mask` asks for; None for nothing.

        Raises:
          TypeError: it is neither a key, an index, a function nor a dict of those.
        """
        if mask is None:
            return None
        pairs = list(mask.items()) if isinstance(mask, Mapping) else [(None, mask)]
        for key, maker in pairs:
            is_input = key is None or _is_key(key)
            if not (pairs and is_input and (_is_key(maker) or callable(maker))):
                raise TypeError(
                    "mask is the key or index of the input that tells which positions are no "
                    "padding, a function of the inputs that gives it, or a dict of those by the "
                    f"inputs whose positions they mark; got {mask!r:.100}"
                )
        if not pairs:
            raise TypeError("mask is an empty dict; leave it out where nothing is padding")
        return Padding(tuple(pairs))

    @staticmethod
    def from_option(option: Any) -> Padding | None:
        """What `option` wrote, as JSON gives it back; None where it was a function."""
        if not option or any(_FUNCTION in pair for pair in option):
            return None
        return Padding(tuple((key, maker) for key, maker in option))

    @property
    def option(self) -> list[list[Any]]:
        """What a calibration file tells of the masks."""
        return [[key, _FUNCTION if callable(maker) else maker] for key, maker in self.masks]

    def values(self, inputs: Sequence[Any]) -> tuple[jax.Array, ...]:
        """The masks of a batch, bool [B, T] each, true where a position is no padding.

        Args:
          inputs: what the model takes after its parameters.

        Raises:
          ValueError: an input is not there, or is no mask.
        """
        found = []
        for _, maker in self.masks:
            mask = maker(*inputs) if callable(maker) else _find(inputs, maker, "mask")[1]
            if np.ndim(mask) != 2:
                raise ValueError(
                    f"{_named(maker)} is of shape {list(np.shape(mask))}; a mask of padding is "
                    "[B, T], for each sample 1 (or True) where a position is no padding, and 0"
                )
            found.append(jnp.asarray(mask).astype(bool))
        return tuple(found)

    def positions(self, model: Model, inputs: Sequence[Any]) -> Positions:
        """Where the masks' samples and positions are in the tensors of a model.

        Args:
          model: the whole model for inputs of these shapes.
          inputs: of it, arrays or shapes.

        Raises:
          ValueError: no input has the positions of a mask.
        """
        sizes = [np.shape(x)[:2] for x in jax.tree.leaves(inputs)]
        shapes = jax.eval_shape(self.values, tuple(jax.tree.map(ir.struct, inputs)))
        own = {
            number: _find(inputs, maker, "mask")[0]
            for number, (_, maker) in enumerate(self.masks)
            if not callable(maker)
        }
        marked = {place: number for number, place in own.items()}
        for number, ((key, maker), mask) in enumerate(zip(self.masks, shapes, strict=True)):
            named = range(len(sizes)) if key is None else [_find(inputs, key, "mask")[0]]
            fitting = [k for k in named if sizes[k] == mask.shape and k not in own.values()]
            if not fitting:
                which = "no other input" if key is None else f"the input {key!r} is none that"
                raise ValueError(
                    f"{_named(maker)} is of shape {list(mask.shape)}, and {which} begins with "
                    f"these sizes: the inputs are of "
                    f"{', '.join(str(list(np.shape(x))) for x in jax.tree.leaves(inputs))}"
                )
            marked.update(dict.fromkeys(fitting, number))
        return find_positions(model, tuple(sorted(marked.items())), tuple(own.values()))

    def real(self, model: Model, inputs: Sequence[Any]) -> RealIn:
        """Which entries of the tensors of a model belong to no padding, for a batch."""
        positions, masks = self.positions(model, inputs), self.values(inputs)
        return functools.partial(positions.real, masks=masks)

    def check(self, inputs: Sequence[Any], batch: int) -> None:
        """Raise ValueError where a mask holds anything but 0 and 1, or marks nothing."""
        for _, maker in self.masks:
            given = maker(*inputs) if callable(maker) else _find(inputs, maker, "mask")[1]
            mask = np.asarray(given)
            if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
                strange = mask[(mask != 0) & (mask != 1)].flat[0]
                raise ValueError(
                    f"{_named(maker)} holds {strange} in batch {batch}; a mask of padding holds 1 "
                    "(or True) where a position is no padding, and 0 elsewhere: give a function, "
                    "mask=lambda *inputs: ..., where the model takes another one"
                )
            if mask.size and not mask.any():
                raise ValueError(
                    f"{_named(maker)} says of every position of batch {batch} that it is padding"
                )


def real_in(padding: Padding | None, model: Model, inputs: Sequence[Any]) -> RealIn:
    """`Padding.real`, also of a model without padding."""
    return all_entries if padding is None else padding.real(model, inputs)


def warn_of_lost(observed: Observed, positions: Positions) -> None:
    """Warn of the tensors whose padded positions are counted, since they are not known."""
    lost = {
        name: behind
        for each in observed.walk()
        for name, var in each.tensors.items()
        if (behind := positions.lost(each.model, var))
    }
    if not lost:
        return
    (name, behind), more = next(iter(lost.items())), len(lost) - 1
    warnings.warn(
        f"mask: padding is counted in {name!r}{f' and {more} more tensors' * (more > 0)}: where "
        f"its positions are is not known behind {behind!r}",
        stacklevel=2,
    )


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int) and not isinstance(key, bool)


def _named(maker: Maker) -> str:
    return "what the function mask gives" if callable(maker) else f"mask={maker!r}"


def _find(inputs: Sequence[Any], key: Key, argument: str) -> tuple[int, Any]:
    """The flat position and the value of an input.

    Args:
      inputs: what the model takes after its parameters.
      key: the index of an argument that is an array, or the key of an array in a dict.
      argument: that names it, for errors.

    Raises:
      ValueError: there is none, or several.
    """
    paths = jax.tree_util.tree_flatten_with_path(tuple(inputs))[0]
    found = [
        (place, leaf)
        for place, (path, leaf) in enumerate(paths)
        if (key == _name(path[-1]) if isinstance(key, str) else [key] == [*map(_name, path)])
    ]
    if len(found) != 1:
        there = ", ".join(_spell(path) for path, _ in paths)
        count = "no input" if not found else f"{len(found)} inputs"
        raise ValueError(f"{argument}={key!r} names {count} of the model; it has {there}")
    return found[0]


def _name(key: Any) -> Any:
    """The name of a step on the path to a leaf: a key, an index or an attribute."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def _spell(path: Sequence[Any]) -> str:
    first, *rest = path
    return f"{_name(first)}{jax.tree_util.keystr(tuple(rest))}"
