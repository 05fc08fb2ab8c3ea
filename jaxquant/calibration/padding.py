"""Masks of padding, the argument `mask`: which positions nobody reads, so that none is counted.

The user names the mask among the model's inputs, or gives a function that makes it of them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.calibration.mask_inputs import Key, Maker, find, named, place_masks
from jaxquant.calibration.observed import Observed
from jaxquant.graph import ir
from jaxquant.graph.model import Model
from jaxquant.graph.positions import Positions, RealIn, all_entries, find_positions

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
        # A mask without a key is that of all inputs of its sizes.
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
        # A function is in no file: whoever reads one gives it again.
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
            mask = maker(*inputs) if callable(maker) else find(inputs, maker, "mask")[1]
            # One axis more would be a mask of pairs, as attention's own.
            if np.ndim(mask) != 2:
                raise ValueError(
                    f"{named(maker)} is of shape {list(np.shape(mask))}; a mask of padding is "
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
        placed = place_masks(self.masks, self.shapes(inputs), model, inputs)
        return find_positions(model, placed.marked, placed.masks, placed.plain)

    def unclear(self, model: Model, inputs: Sequence[Any]) -> list[str]:
        """The inputs of a mask's sizes of which the model does not show whose positions they have.

        Where it does of no input, all are taken as the mask's; else these are counted whole.
        """
        return place_masks(self.masks, self.shapes(inputs), model, inputs).unclear

    def shapes(self, inputs: Sequence[Any]) -> list[tuple[int, ...]]:
        """The shapes of the masks, [B, T] each."""
        # By shapes: a function of the user's is not run for them.
        masks = jax.eval_shape(self.values, tuple(jax.tree.map(ir.struct, inputs)))
        return [mask.shape for mask in masks]

    def real(self, model: Model, inputs: Sequence[Any]) -> RealIn:
        """Which entries of the tensors of a model belong to no padding, for a batch."""
        positions, masks = self.positions(model, inputs), self.values(inputs)
        return functools.partial(positions.real, masks=masks)

    def check(self, inputs: Sequence[Any], batch: int) -> None:
        """Raise ValueError where a mask holds anything but 0 and 1, or marks nothing."""
        for _, maker in self.masks:
            given = maker(*inputs) if callable(maker) else find(inputs, maker, "mask")[1]
            # Once, on the host: what is looked at are values.
            mask = np.asarray(given)
            if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
                strange = mask[(mask != 0) & (mask != 1)].flat[0]
                raise ValueError(
                    f"{named(maker)} holds {strange} in batch {batch}; a mask of padding holds 1 "
                    "(or True) where a position is no padding, and 0 elsewhere: give a function, "
                    "mask=lambda *inputs: ..., where the model takes another one"
                )
            if mask.size and not mask.any():
                raise ValueError(
                    f"{named(maker)} says of every position of batch {batch} that it is padding"
                )


def real_in(padding: Padding | None, model: Model, inputs: Sequence[Any]) -> RealIn:
    """`Padding.real`, also of a model without padding."""
    return all_entries if padding is None else padding.real(model, inputs)


def warn_of_counted(padding: Padding, observed: Observed, inputs: Sequence[Any]) -> None:
    """Warn of what is counted whole though it may hold padding."""
    model = observed.model
    if unclear := padding.unclear(model, inputs):
        warnings.warn(
            f"mask: whether {', '.join(unclear)} has the same positions as the mask is not seen in "
            "the model; name the mask of each input by a dict, mask={'ids': 'ids_mask', ...}",
            stacklevel=2,
        )
    positions = padding.positions(model, inputs)
    # One tensor is named, with how many others: a transformer has hundreds.
    counted: dict[str, str] = {}
    for each in observed.walk():
        for name, var in each.tensors.items():
            if behind := positions.lost(each.model, var):
                counted[name] = f"where its positions are is not known behind {behind!r}"
            elif positions.is_filled(each.model, var):
                counted[name] = "the model adds or writes values of its own there by the mask"

    # Found to the end before it is told: one warning is read, a hundred are not.
    if counted:
        (name, reason), more = next(iter(counted.items())), len(counted) - 1
        others = f" and {more} more tensors" if more else ""
        warnings.warn(f"mask: padding is counted in {name!r}{others}: {reason}", stacklevel=2)


def _is_key(key: Any) -> bool:
    return isinstance(key, str | int) and not isinstance(key, bool)
