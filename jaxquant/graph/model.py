"""A model: what one trace tells of a function, found once and handed on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxquant.graph import ir
from jaxquant.graph.composites import Composites
from jaxquant.graph.regions import Region
from jaxquant.graph.sites import Site, find_lookups, find_sites, tensor_names
from jaxquant.graph.trace import trace


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A traced function with what is found in it.

    Immutable; each property is found once, when it is first read.  Another input shape is another
    model.

    Attributes:
      graph: what the function computes.
    """

    graph: ir.Graph

    @functools.cached_property
    def root(self) -> Region:
        """The model's own graph as a region, which holds the others."""
        return Region(self.graph)

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
        return find_sites(self.root)

    @functools.cached_property
    def with_lookups(self) -> tuple[Site, ...]:
        """The sites and the embeddings; the sites have the same names as without."""
        found = (*self.sites, *find_lookups(self.graph, self.sites))
        return tuple(sorted(found, key=lambda site: site.location))

    def sites_of(self, lookups: bool) -> tuple[Site, ...]:
        """The sites, with the embeddings where a mode takes them for sites."""
        return self.with_lookups if lookups else self.sites

    @functools.cached_property
    def names(self) -> Mapping[ir.Var, str]:
        """Names of the tensors that sites read; see `jaxquant.graph.sites.tensor_names`."""
        return tensor_names(self.graph, self.sites)


class FloatModel:
    """The user's function and its parameters: the float model, traced once for each input shape.

    Attributes:
      apply_fn: `apply_fn(params, *inputs)`.
      params: its parameters.
    """

    def __init__(self, apply_fn: Callable[..., Any], params: Any) -> None:
        self.apply_fn = apply_fn
        self.params = params
        self._structs = jax.tree.map(ir.struct, params)
        self._models: dict[Any, Model] = {}

    def trace(self, inputs: tuple[Any, ...]) -> Model:
        """The model for inputs of these shapes and dtypes.

        Raises:
          ValueError: see `jaxquant.graph.trace.trace`; and whatever the function raises.
        """
        leaves, tree = jax.tree.flatten(jax.tree.map(ir.struct, inputs))
        key = tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._models:
            self._models[key] = trace_model(self.apply_fn, self._structs, inputs)
        return self._models[key]


def trace_model(apply_fn: Callable[..., Any], params: Any, inputs: Sequence[Any]) -> Model:
    """The model of `apply_fn(params, *inputs)`; see `jaxquant.graph.trace.trace`."""
    return Model(trace(apply_fn, params, inputs))
