"""The parameter that is added to the sums of a site: where a mean error of theirs is taken away.

A bias, or the mean that a BatchNorm behind the site subtracts.  It is changed in the parameters, at
no cost in the call, so it must be read nowhere else.  Inside a scan over stacked weights each layer
has its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir, primitives
from jaxquant.graph.copies import without_copies
from jaxquant.graph.matching import is_float_cast
from jaxquant.graph.model import Model
from jaxquant.graph.once import once
from jaxquant.graph.sites import Site
from jaxquant.jax_shim import jaxprs
from jaxquant.plan.epilogue import AffineStep, find_epilogue
from jaxquant.recover.folding import is_alone
from jaxquant.run.layers import Layer
from jaxquant.weights.fold import channel_vector


class Added(NamedTuple):
    """A parameter with one number for each output channel of a site.

    Attributes:
      leaf: of the whole model.
      is_subtracted: whether it is taken from the sums.
      places: int [C], where the number of each channel is in it (of a layer), flattened.
    """

    leaf: ir.Var
    is_subtracted: bool
    places: np.ndarray


class Addition(NamedTuple):
    """What is added to the outputs of a site.

    Attributes:
      added: the parameter that is changed for it.
      layer: its numbers in the scans around the site.
      by: [C].
    """

    added: Added
    layer: Layer
    by: np.ndarray


@once
def find_added(model: Model, site: Site) -> Added | None:
    """What is added to the sums of a site before anything else is done with them; None for nothing.

    Args:
      model: of the graph that the site is in.
      site: with a stored weight.
    """
    graph = model.graph
    steps = find_epilogue(graph, site).steps
    if not steps or steps[0].op not in ("add", "sub") or not isinstance(steps[0].operand, int):
        return None
    moved = _movements(graph, steps[0].operand)
    if moved is None:
        return None
    leaf, movements = moved
    places = _places(graph, leaf, movements, steps[0])
    if len(places) != math.prod(steps[0].channels.sizes):
        return None  # a scalar, which all channels share
    # One number for each channel, and one channel for each number.
    if not np.array_equal(np.sort(places), np.arange(math.prod(graph.shape(leaf)))):
        return None
    whole = _of_whole(model, leaf)
    return None if whole is None else Added(whole, steps[0].op == "sub", places)


def seen_at(model: Model, site: Site) -> ir.Var:
    """Where the error of a site with a stored weight is seen: behind what takes its mean away."""
    steps = 0 if find_added(model, site) is None else 1
    return find_epilogue(model.graph, site, steps_at_most=steps).output


def with_addition(array: np.ndarray, addition: Addition) -> np.ndarray:
    """A parameter with which more is added to the sums of a site, in its own dtype.

    Args:
      array: the parameter, of all layers.
      addition: how much more.
    """
    after = np.array(array)
    own = after[addition.layer]
    values = own.reshape(-1).astype(np.float64)
    values[addition.added.places] += -addition.by if addition.added.is_subtracted else addition.by
    after[addition.layer] = values.reshape(own.shape).astype(after.dtype)
    return after


def _movements(graph: ir.Graph, var: ir.Var) -> tuple[ir.Var, list[ir.Equation]] | None:
    """The parameter that a static tensor is, moved and cast, and the movements; None: it is not."""
    found: list[ir.Equation] = []
    while var not in graph.leaves:
        eqn = graph.producer.get(var)
        if eqn is None or not is_alone(graph, var) or len(eqn.input_vars) != 1:
            return None
        if eqn.name in primitives.MOVEMENTS or eqn.name == "broadcast_in_dim":
            found.insert(0, eqn)
        elif not is_float_cast(graph, eqn):
            return None
        var = eqn.input_vars[0]
    is_float = jnp.issubdtype(graph.dtype(var), jnp.floating)
    return (var, found) if is_float and is_alone(graph, var) else None


def _places(
    graph: ir.Graph, leaf: ir.Var, movements: list[ir.Equation], step: AffineStep
) -> np.ndarray:
    """For each channel of a site, the number of the element of a parameter that is added to it."""
    # Followed on the numbers of the elements, whichever way they are moved.
    shape = graph.shape(leaf)
    numbers: Any = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    # Where a caller is traced itself these are numbers all the same.
    with jax.ensure_compile_time_eval():
        for eqn in (each for each in movements if each.name not in primitives.PLACEMENTS):
            (numbers,) = jaxprs.bind(eqn.primitive, [numbers], dict(eqn.params))
    assert isinstance(step.operand, int)
    whole = np.broadcast_to(np.asarray(numbers), graph.shape(step.operand))
    vector = channel_vector(step, {step.operand: without_copies(graph, step.operand, whole)})
    return np.atleast_1d(vector).astype(np.int64)


def _of_whole(model: Model, leaf: ir.Var) -> ir.Var | None:
    """The leaf of the whole model that one of a body is, where nothing else reads it; else None.

    One that a scan over stacked weights does not slice is of all layers together: none of them has
    it alone.
    """
    while model.holder is not None:
        assert model.body is not None
        assert model.body.equation is not None
        is_choice = model.body.equation.name == "cond"  # whose other branches may read it as well
        if is_choice or (model.layers is not None and leaf not in model.sliced):
            return None
        outside = model.leaf_operands.get(leaf)
        model = model.holder
        if outside is None or outside not in model.graph.leaves or not is_alone(
            model.graph, outside
        ):  # fmt: skip
            return None
        leaf = outside
    return leaf
