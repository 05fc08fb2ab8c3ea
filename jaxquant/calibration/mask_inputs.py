"""Which inputs of a model have the positions of which mask of padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxquant.graph.model import Model
from jaxquant.graph.positions import Marked
from jaxquant.graph.sequences import find_sequences
from jaxquant.graph.trace import trace

Key: TypeAlias = str | int
Maker: TypeAlias = Key | Callable[..., Any]


class Placed(NamedTuple):
    """Which inputs have the positions of which mask.

    Attributes:
      marked: position of a flattened input, number of its mask.
      masks: the positions of the inputs that are masks themselves.
      plain: the positions of the inputs [B, T] that masks are made of: they say how long a text is,
        and are no activations, floats or not.
      unclear: the names of inputs of which the model does not show whether they have them.
    """

    marked: Marked
    masks: tuple[int, ...]
    plain: tuple[int, ...]
    unclear: list[str]


class _Source(NamedTuple):
    """What a mask is made of.

    Attributes:
      given: the position of the input that it is, but for its type; None where it is computed.
      read: the positions of the inputs that it is made of.
    """

    given: int | None
    read: frozenset[int]


def place_masks(
    masks: Sequence[tuple[Key | None, Maker]],
    shapes: Sequence[tuple[int, ...]],
    model: Model,
    inputs: Sequence[Any],
) -> Placed:
    """Find which inputs have the positions of which mask.

    Args:
      masks: as `Padding` has them.
      shapes: of each, [B, T].
      model: the whole model for inputs of these shapes.
      inputs: of it, arrays or shapes.

    Raises:
      ValueError: no input has those of a mask.
    """
    sources = [_source(maker, inputs) for _, maker in masks]
    numbers = _numbers(masks, sources)
    # What an input is by itself, its own mask marks.
    own = {number: x.given for number, x in enumerate(sources) if x.given is not None}
    marked = {place: numbers[k] for k, place in own.items()}
    unclear: set[int] = set()
    for number, ((key, maker), shape) in enumerate(zip(masks, shapes, strict=True)):
        # Inputs that begin with the mask's sizes may have its positions, or others as many.
        # An input that is a mask of its own is marked already.
        fitting = [k for k in _of_sizes(inputs, shape, key) if k not in own.values()]
        if not fitting and not (callable(maker) and number in own):
            raise ValueError(_says_none_fits(inputs, shape, key, maker))

        # What the model does not read says nothing of itself.
        used = [k for k in fitting if model.graph.inputs[k] in model.graph.consumers]
        # Which of several have the same positions is seen in the model: they meet, or do not.
        if len(used) > 1:
            fitting, others = _of_one_sequence(model, used, sources[number].read)
            unclear.update(others)
        marked.update(dict.fromkeys(fitting, numbers[number]))
    paths = jax.tree_util.tree_flatten_with_path(tuple(inputs))[0]
    names = [_spell(paths[place][0]) for place in sorted(unclear)]
    read = frozenset().union(*(source.read for source in sources))
    leaves = jax.tree.leaves(inputs)
    # Of two axes: a length for each position, and no activation with channels.
    flat = tuple(place for place in sorted(read) if np.ndim(leaves[place]) == 2)
    return Placed(tuple(sorted(marked.items())), tuple(own.values()), flat, names)


def _numbers(masks: Sequence[tuple[Key | None, Maker]], sources: Sequence[_Source]) -> list[int]:
    """For each mask, the number of the first one that is the same.

    Positions of two masks that meet are taken for those of neither: inputs for which a user names
    one mask twice, as a text's words and their kinds, have to be known as of one.
    """
    same = [
        maker if source.given is None else source.given
        for (_, maker), source in zip(masks, sources, strict=True)
    ]
    return [same.index(each) for each in same]


def _of_sizes(inputs: Sequence[Any], shape: tuple[int, ...], key: Key | None) -> list[int]:
    """The inputs that begin with the sizes of a mask; of one that is named, that one alone."""
    leaves = jax.tree.leaves(inputs)
    candidates = range(len(leaves)) if key is None else [find(inputs, key, "mask")[0]]
    return [k for k in candidates if np.shape(leaves[k])[:2] == shape]


def _says_none_fits(
    inputs: Sequence[Any], shape: tuple[int, ...], key: Key | None, maker: Maker
) -> str:
    which = "no other input" if key is None else f"the input {key!r} is none that"
    return (
        f"{named(maker)} is of shape {list(shape)}, and {which} begins with these sizes: the "
        f"inputs are of {', '.join(str(list(np.shape(x))) for x in jax.tree.leaves(inputs))}"
    )


def _source(maker: Maker, inputs: Sequence[Any]) -> _Source:
    if not callable(maker):
        given = find(inputs, maker, "mask")[0]
        return _Source(given, frozenset({given}))
    graph = trace(lambda _, *given: maker(*given), {}, inputs)
    # Of pure functions of inputs, whose graph tells what is read.
    (atom,) = graph.outputs
    read = frozenset(k for k, var in enumerate(graph.inputs) if var in graph.needed(atom))
    # A cast of a mask is the mask.
    while isinstance(atom, int) and (eqn := graph.producer.get(atom)) is not None:
        if eqn.name not in ("convert_element_type", "copy"):
            break
        (atom,) = eqn.inputs
    return _Source(graph.inputs.index(atom) if atom in graph.inputs else None, read)


def _of_one_sequence(
    model: Model, fitting: Sequence[int], read: frozenset[int]
) -> tuple[list[int], list[int]]:
    """Which of some inputs have the positions of what a mask is made of.

    Args:
      model: the whole model.
      fitting: the inputs.
      read: those that the mask is made of.

    Returns:
      Those inputs, or all where the mask meets none of them; and those of which the model does not
      show whether they have the positions or others.
    """
    found = find_sequences(model, tuple(sorted({*fitting, *read})))
    same = found.of(read)
    theirs = [place for place in fitting if place in same]
    if not theirs:  # the model does not use its mask
        return list(fitting), [x for x in fitting if x not in found.of(fitting[:1])]
    others = [place for place in fitting if place not in same]
    return theirs, [x for x in others if not any(found.are_apart(x, own) for own in same)]


def named(maker: Maker) -> str:
    """How errors name a mask."""
    return "what the function mask gives" if callable(maker) else f"mask={maker!r}"


def find(inputs: Sequence[Any], key: Key, argument: str) -> tuple[int, Any]:
    """The flat position and the value of an input.

    Args:
      inputs: what the model takes after its parameters.
      key: the index of an argument that is an array, or the key of an array in a dict.
      argument: that names it, for errors.

    Raises:
      ValueError: there is none, or several.
    """
    paths = jax.tree_util.tree_flatten_with_path(tuple(inputs))[0]
    # A key is the last part of a path, or all of it: inputs may be dicts in tuples.
    found = [
        (number, leaf)
        for number, (path, leaf) in enumerate(paths)
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
