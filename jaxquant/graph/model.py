"""A model: what one trace tells of a function, found once and handed on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from jaxquant.graph import ir
from jaxquant.graph.composites import Composites
from jaxquant.graph.cuts import Cuts, Segment, cut_graph, cut_tree, pieces
from jaxquant.graph.expressions import Expression, Expressions
from jaxquant.graph.finding import find_sites
from jaxquant.graph.naming import tensor_names
from jaxquant.graph.regions import CONTROL_FLOW, Region
from jaxquant.graph.sites import Site, from_outside, within
from jaxquant.graph.trace import trace


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A traced function with what is found in it.

    Immutable; each property is found once, when it is first read.  Another input shape is another
    model.

    Attributes:
      graph: what the function computes.
      body: the region that it is, of a loop or a choice of another model; None for a whole model.
      holder: the model that holds the body; None for a whole model.
      cuts: of a whole model, where scans are cut into segments.
      origins: of such a model, what its equations were before.
    """

    graph: ir.Graph
    body: Region | None = None
    holder: Model | None = None
    cuts: Cuts = dataclasses.field(default_factory=dict)
    origins: Mapping[int, Segment] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def joins(self) -> frozenset[int]:
        """The indices of the equations that put together the pieces of a scan that is cut."""
        return frozenset(index for index, origin in self.origins.items() if origin.joins)

    @functools.cached_property
    def root(self) -> Region:
        """The model's own graph as a region, which holds the others."""
        return self.body or Region(self.graph)

    @property
    def whole(self) -> Model:
        """The outermost model."""
        return self if self.holder is None else self.holder.whole

    @functools.cached_property
    def bodies(self) -> Mapping[int, tuple[Model, ...]]:
        """The bodies of loops and choices as models of their own, by the index of their equation.

        Their leaves are what the loop reads of the parameters: of a scan over stacked parameters
        one slice.  The test of a `while` is none of them, and neither is a loop without a step.
        """
        found = {}
        for eqn in self.graph.equations:
            if eqn.name not in CONTROL_FLOW or eqn.params.get("length") == 0:
                # The result of a loop over parameters alone is a number like any other.
                continue
            if eqn.outputs and self.graph.static[eqn.outputs[0]]:
                continue
            bodies = [body for body in self.root.bodies(eqn) if body.key != "cond_jaxpr"]
            found[eqn.index] = tuple(Model(body.graph, body, self) for body in bodies)
        return found

    @functools.cached_property
    def layers(self) -> int | None:
        """How many layers a scan has whose weights are stacked; None for what is no such scan."""
        if self.body is None or self.body.equation is None or not self.sliced:
            return None
        # A scan whose slices are no weights has one program and one scale for all its steps.
        return int(self.body.equation.params["length"])

    def varies_by_layer(self, var: ir.Var) -> tuple[bool, ...]:
        """Whether a static tensor differs from layer to layer, for each of the `scans` around.

        Empty in a whole model.
        """
        if self.body is None or self.holder is None:
            return ()
        sources = {v for v in self.graph.sources(var) if v in self.graph.leaves}
        outside = [self.holder.varies_by_layer(v) for v in self._operands_of(sources)]
        # Weights without a source outside vary along none of the scans.
        around = tuple(any(each) for each in zip(*outside, strict=True)) or (False,) * len(
            self.holder.scans
        )
        return around if self.layers is None else (*around, bool(sources & self.sliced))

    @property
    def scans(self) -> tuple[int, ...]:
        """The numbers of layers of the scans over stacked weights around it, outermost first."""
        around = () if self.holder is None else self.holder.scans
        return around if self.layers is None else (*around, self.layers)

    @functools.cached_property
    def leaf_operands(self) -> Mapping[ir.Var, ir.Var]:
        """The leaves of a body -> the static tensors of the holder's graph that they stand for."""
        assert self.body is not None
        pairs = zip(self.body.arguments, self.body.operands, strict=True)
        return {
            var: atom for var, atom in pairs if var in self.graph.leaves and isinstance(atom, int)
        }

    @functools.cached_property
    def sliced(self) -> frozenset[ir.Var]:
        """The leaves that are another slice in each step; none where no weight is made of them."""
        if self.body is None:
            return frozenset()
        taken = {self.body.arguments[k] for k in self.body.scanned}
        return frozenset(taken.intersection(self.graph.leaves))

    def _operands_of(self, leaves: Collection[ir.Var]) -> list[ir.Var]:
        """The tensors of the holder that leaves of this body stand for."""
        return [self.leaf_operands[var] for var in self.graph.leaves if var in leaves]

    def expression(self, var: ir.Var) -> Expression:
        """Equal for static tensors of the whole model, its bodies too, that are stored alike.

        Those are computed alike, but what a scan reads of a tensor, another slice in each step,
        counts as the same in all scans over it that are equally deep.  The scans of a nest have
        steps of their own, so that their slices of one tensor are two.
        """
        return self._expressions[var]

    @functools.cached_property
    def _expressions(self) -> Mapping[ir.Var, Expression]:
        numbers, place = self.whole._numbers, self.root.location
        sources = {
            var: numbers.number("source", place, var)
            for var in (*self.graph.leaves, *self.graph.constants)
        }
        # A leaf of a body is the operand outside, or a slice of it: so both share what is stored.
        if self.holder is not None:
            for var, operand in self.leaf_operands.items():
                outside = self.holder.expression(operand)
                # As deep as its nest: slices of one scan in another are others than those of that
                # alone.
                depth = len(self.scans)
                is_slice = var in self.sliced
                sources[var] = numbers.number("slice", depth, outside) if is_slice else outside
        return numbers.of_graph(self.graph, sources)

    @functools.cached_property
    def _numbers(self) -> Expressions:
        return Expressions()

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """The model's own graph and the bodies of its loops and choices, behind their holders."""
        return tuple(self.root.walk())

    @property
    def composites(self) -> Composites:
        """What JAX writes as several equations of the model's own graph."""
        return self.root.composites

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every operation of a known kind that depends on the inputs, in evaluation order."""
        return self._shown(self.whole._everywhere)

    @property
    def located(self) -> Sequence[Site]:
        """The sites of the whole model, those in bodies too, as it has them."""
        return self.whole.sites

    @functools.cached_property
    def in_bodies(self) -> frozenset[str]:
        """The names of the sites in `bodies`, and in those inside these."""
        return frozenset(
            site.name for bodies in self.bodies.values() for body in bodies for site in body.sites
        )

    @functools.cached_property
    def _everywhere(self) -> tuple[Site, ...]:
        """The sites of a whole model, those in bodies with the tensors of these."""
        return find_sites(self.root)

    def _shown(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites in this model, of some of the whole one, as it shows them."""
        own = self.root.location
        return tuple(
            # Seen from this model: what is deeper inside has no tensors here.
            from_outside(within(self._with_scans(site), self.root))
            for site in sites
            if site.location[: len(own)] == own
        )

    def _with_scans(self, site: Site) -> Site:
        """A site of the whole model with the scans over stacked weights around it."""
        around = self.whole._scans_around
        place = site.location[:-1]
        while place not in around:  # the test of a `while` is in none of the bodies
            place = place[:-2]
        return dataclasses.replace(site, scans=around[place])

    @functools.cached_property
    def _scans_around(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Where a region is -> the `scans` of its model, of this model and its bodies."""
        found = {self.root.location: self.scans}
        for bodies in self.bodies.values():
            for body in bodies:
                found |= body._scans_around
        return found

    @functools.cached_property
    def names(self) -> Mapping[ir.Var, str]:
        """Names of the tensors that sites read; see `jaxquant.graph.naming.tensor_names`."""
        return tensor_names(self.graph, self.sites)


class FloatModel:
    """The user's function and its parameters: the float model, traced once for each input shape.

    Attributes:
      apply_fn: `apply_fn(given, *inputs)`.
      given: its parameters, as the user has them.
      params: those of the traced models: the same, or with those that are cut in pieces.
      cuts: where scans are cut into segments.
    """

    def __init__(self, apply_fn: Callable[..., Any], params: Any, cuts: Cuts | None = None) -> None:
        self.apply_fn = apply_fn
        self.given = params
        self.cuts: Cuts = cuts or {}
        self.params = cut_tree(params, self.cuts, pieces)
        self._structs = jax.tree.map(ir.struct, params)
        self._models: dict[Any, Model] = {}

    def trace(self, inputs: tuple[Any, ...]) -> Model:
        """The model for inputs of these shapes and dtypes.

        Raises:
          ValueError: see `jaxquant.graph.trace.trace`; and whatever the function raises.
        """
        leaves, tree = jax.tree.flatten(jax.tree.map(ir.struct, inputs))
        # Dtypes and shapes are all that a trace depends on.
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._models:
            self._models[key] = trace_model(self.apply_fn, self._structs, inputs, self.cuts)
        return self._models[key]


def trace_model(
    apply_fn: Callable[..., Any], params: Any, inputs: Sequence[Any], cuts: Cuts | None = None
) -> Model:
    """The model of `apply_fn(params, *inputs)`; see `jaxquant.graph.trace.trace`.

    Args:
      apply_fn, params, inputs: the function and what it takes, arrays or shapes.
      cuts: where its scans are cut into segments.
    """
    graph = trace(apply_fn, params, inputs)
    if not cuts:
        return Model(graph)
    # Cut behind the trace, so that both graphs have the same tensors.
    found, origins = cut_graph(graph, params, cuts)
    return Model(found, cuts=cuts, origins=origins)
