"""Which inputs of a model have the positions of one sequence, as a text's words and their kinds do.

An encoder's text and a decoder's may be of one length by chance, and then their sizes do not tell
them apart; what the model does with them does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from jaxquant.graph.axis_parts import Part
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.positions import find_positions


class Sequences(NamedTuple):
    """How some inputs go together.

    Attributes:
      groups: the inputs by sequence: those of a group meet position by position.
      apart: pairs of inputs that have axes of their own in one tensor, as queries and keys have.
    """

    groups: tuple[frozenset[int], ...]
    apart: frozenset[frozenset[int]]

    def of(self, places: Iterable[int]) -> frozenset[int]:
        """The inputs that are of one sequence with any of these."""
        wanted = frozenset(places)
        return frozenset().union(*(group for group in self.groups if group & wanted))

    def are_apart(self, one: int, other: int) -> bool:
        """Whether two inputs are two sequences, that of queries and that of keys, say."""
        return frozenset({one, other}) in self.apart


@once
def find_sequences(model: Model, places: tuple[int, ...]) -> Sequences:
    """Follow the positions of some inputs [B, T, ...] through a whole model, each as its own.

    Args:
      model: it.
      places: the inputs, by their position among the flattened ones.
    """
    groups = {place: frozenset({place}) for place in places}
    while True:  # where positions meet nothing is known behind, until they are one
        # A group goes by its least number, so that all of it has one mark.
        marks = {place: min(group) for place, group in groups.items()}
        # Positions that meet (in a sum, say) are of one sequence, and are followed once more as
        # one.
        parts = _all_parts(model, tuple(sorted(marks.items())))
        met = {part.met for axis in parts for part in axis if part.met}
        if not met:
            break
        for marks_met in met:
            joined = frozenset().union(*(groups[mark] for mark in marks_met))
            groups.update(dict.fromkeys(joined, joined))
    apart: set[frozenset[int]] = set()
    for several in parts:
        # Two marks on two axes of one tensor (scores of attention) are not the same positions.
        beside = {part.mark for part in several if part.is_position and part.mark is not None}
        for one, other in itertools.combinations(sorted(beside), 2):
            apart.update(map(frozenset, itertools.product(groups[one], groups[other])))
    return Sequences(tuple(dict.fromkeys(groups.values())), frozenset(apart))


def _all_parts(model: Model, marked: tuple[tuple[int, int], ...]) -> list[list[Part]]:
    """The parts of the axes of every tensor in which some inputs have these marks."""
    found = find_positions(model, marked)
    return [known.parts for region in found.by_region.values() for known in region.values()]
