"""Which axes of a model's tensors are the samples and the positions of a mask [B, T].

A text model's inputs have an axis of samples and one of positions, and so have most of its
tensors; where an entry belongs to a position that is padding, nobody reads it.  The axes are
followed from the inputs by the rules of `jaxquant.graph.position_rules`, into loops and choices
too.  An axis that cannot be followed is not guessed by its size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.axis_parts import BATCH, Known, join, leading, nothing, of_input
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.position_rules import through
from jaxquant.graph.regions import CONTROL_FLOW, Region

# Position of a flattened input -> the number of the mask that marks its positions.
Marked: TypeAlias = tuple[tuple[int, int], ...]
# Gives which entries of a tensor of a model, or of one of its bodies, belong to no padding, bool of
# a shape that is broadcast to the tensor's; None where all of them count.
RealIn: TypeAlias = Callable[[Model, ir.Atom], jax.Array | None]
_ROUNDS = 8  # of a loop's body, until its carry stays as it is
_Found: TypeAlias = dict[tuple[int, ...], dict[ir.Var, Known]]


class Positions(NamedTuple):
    """What is known of the tensors of a model.

    Attributes:
      by_region: location of a region -> its tensors.
    """

    by_region: Mapping[tuple[int, ...], Mapping[ir.Var, Known]]

    def known(self, model: Model, var: ir.Atom) -> Known:
        """What is known of a tensor of a model or of one of its bodies."""
        found = self.by_region.get(model.root.location, {})
        nowhere = nothing(model.graph.shape(var))
        return found.get(var, nowhere) if isinstance(var, int) else nowhere

    def lost(self, model: Model, var: ir.Var) -> str:
        """The primitive behind which a tensor's positions are not known; "" where they are."""
        known = self.known(model, var)
        return "" if known.tells else known.lost

    def is_filled(self, model: Model, var: ir.Var) -> bool:
        """Whether a product reads, as such, what the model has filled in where padding is."""
        is_read = any(eqn.index in model.graph.contractions for eqn in model.graph.consumers[var])
        return is_read and any(part.filled for part in self.known(model, var).parts)

    def real(self, model: Model, var: ir.Atom, masks: Sequence[jax.Array]) -> jax.Array | None:
        """Which entries of a tensor belong to no padding.

        Args:
          model, var: the tensor.
          masks: bool [B, T] each, true where a position is no padding.

        Returns:
          bool, of a shape that is broadcast to the tensor's; None where all of them count.
        """
        known = self.known(model, var)
        # A mask itself counts whole: it is what tells.
        return _entries(known, masks) if _is_placed(known) else None


def all_entries(model: Model, var: ir.Atom) -> None:
    """The `RealIn` of a model without padding."""


@once
def find_positions(
    model: Model, marked: Marked, masks: tuple[int, ...] = (), plain: tuple[int, ...] = ()
) -> Positions:
    """Follow the axes of some inputs through a whole model.

    Args:
      model: it.
      marked: the inputs whose first two axes are those of a mask.
      masks: the positions of the inputs that are masks themselves.
      plain: those of the inputs that hold no activations, floats though they are.
    """
    graph, numbers = model.graph, dict(marked)
    given = {
        var: of_input(
            graph.shape(var),
            numbers.get(place),
            is_plain=place in (*masks, *plain)
            # Ids and truth values are no activations.
            or not jnp.issubdtype(graph.dtype(var), jnp.floating),
            tells=place in masks or graph.dtype(var) == jnp.bool_,
        )
        for place, var in enumerate(graph.inputs)
    }
    found: _Found = {}
    _follow(model.root, given, found)
    return Positions(found)


@once
def find_samples(model: Model) -> Positions:
    """Follow the first axis of all inputs, that of the samples, through a whole model."""
    graph = model.graph
    given = {}
    for var in graph.inputs:
        first, *others = nothing(graph.shape(var)).axes or ((),)
        samples = tuple(part._replace(mark=BATCH) for part in first)
        # A scalar input has no axis at all.
        given[var] = Known((samples, *others) if samples else ())
    found: _Found = {}
    _follow(model.root, given, found)
    return Positions(found)


def _is_placed(known: Known) -> bool:
    """Whether a mask says which entries of a tensor nobody reads.

    It has one axis of samples, and is not itself what tells of padding.
    """
    return not known.tells and [part.mark for part in known.parts].count(BATCH) == 1


def _entries(known: Known, masks: Sequence[jax.Array]) -> jax.Array:
    parts = known.parts
    sizes = [part.size for part in parts]
    samples = next(k for k, part in enumerate(parts) if part.mark == BATCH)
    used, selections = {samples}, []
    for place, part in enumerate(parts):
        # Positions that the model has filled are read, so they count.
        if part.mark is not None and part.mark != BATCH and not part.filled:
            used.add(place)
            # The mask is [B, T]; where the samples come behind the positions it is turned.
            mask = masks[part.mark] if samples < place else masks[part.mark].T
            shape = [size if k in (samples, place) else 1 for k, size in enumerate(sizes)]
            selections.append(mask.reshape(shape))
    if not selections:  # a sample all of whose positions are padding is none
        some = functools.reduce(jnp.logical_or, [mask.any(axis=1) for mask in masks])
        shape = [size if k == samples else 1 for k, size in enumerate(sizes)]
        selections.append(some.reshape(shape))
    real = functools.reduce(jnp.logical_and, selections)

    # The parts of an axis that hold a part of a mask become that axis; others stay of size 1.
    first, wide, whole = 0, [1] * len(parts), []
    for axis in known.axes:
        own = range(first, first + len(axis))
        first += len(axis)
        if used.intersection(own):
            for place in own:
                wide[place] = sizes[place]
        whole.append(math.prod(wide[place] for place in own))
    return jnp.broadcast_to(real, wide).reshape(whole)


def _follow(region: Region, given: Mapping[ir.Var, Known], found: _Found) -> dict[ir.Var, Known]:
    """What is known of the tensors of a region, given its inputs; put into `found` too."""
    graph, known = region.graph, dict(given)

    # `known` grows on the way.
    of = functools.partial(_of_atom, graph, known)
    for eqn in graph.equations:
        if not eqn.outputs or graph.static[eqn.outputs[0]]:
            continue
        operands = [of(x) for x in eqn.inputs]
        if eqn.name in CONTROL_FLOW:
            results = _through_bodies(region, eqn, of, found)
        else:
            results = through(graph, eqn, operands)
        known.update(zip(eqn.outputs, results, strict=True))
    found[region.location] = known
    return known


def _through_bodies(
    region: Region, eqn: ir.Equation, outside: Callable[[ir.Atom], Known], found: _Found
) -> list[Known]:
    """What is known of the results of a loop or choice."""
    bodies = [body for body in region.bodies(eqn) if body.key != "cond_jaxpr"]
    every = [_through_body(body, eqn, outside, found) for body in bodies]
    return [join(each, eqn.name) for each in zip(*every, strict=True)]


def _through_body(
    body: Region, eqn: ir.Equation, outside: Callable[[ir.Atom], Known], found: _Found
) -> list[Known]:
    """What is known of the results of an equation, by one of its bodies.

    Args:
      body: it.
      eqn: the equation.
      outside: gives what is known of the tensors around it.
      found: where what is known inside is put.
    """
    graph = body.graph
    read = [
        nothing(graph.shape(var)) if atom is None else outside(atom)
        for var, atom in zip(body.arguments, body.operands, strict=True)
    ]
    # A step sees a slice of what is scanned.
    feeding = [x.without_leading(eqn.name) if k in body.scanned else x for k, x in enumerate(read)]
    for number in range(_ROUNDS):  # what a step leaves in the carry, the next one reads
        if number == _ROUNDS - 1:  # it goes back and forth
            for place in body.carries:
                feeding[place] = nothing(graph.shape(body.arguments[place]), lost=eqn.name)
        # Again, until what is known of the carry stands still: it only ever becomes less.
        results = _results(body, feeding, found)
        new = list(feeding)
        for place, out in body.carries.items():
            new[place] = join((feeding[place], results[out]), eqn.name)
        if new == feeding:
            break
        feeding = new
    if eqn.name != "scan":
        return [results[k] for k in range(len(eqn.outputs))]
    steps = leading([read[k] for k in body.scanned], eqn.params["length"])
    carried = {*body.carries.values()}
    # What is stacked gets the axis of the steps back.
    return [x if k in carried else x.with_leading(steps) for k, x in enumerate(results)]


def _results(body: Region, feeding: Sequence[Known], found: _Found) -> list[Known]:
    """What is known of the outputs of a body, given its arguments."""
    graph = body.graph
    inner = _follow(body, dict(zip(body.arguments, feeding, strict=True)), found)
    return [_of_atom(graph, inner, x) for x in graph.outputs]


def _of_atom(graph: ir.Graph, known: Mapping[ir.Var, Known], atom: ir.Atom) -> Known:
    """What is known of an operand."""
    if isinstance(atom, int) and atom in known:
        return known[atom]
    return nothing(graph.shape(atom), is_static=graph.is_static(atom))
