"""The int8 tensors whose input channels may have steps of their own, and the look at them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import evaluate, ir
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan import layout
from jaxquant.plan.inputs import input_axes
from jaxquant.recover.looks import Look, Real, is_replaced
from jaxquant.recover.product import SiteProduct
from jaxquant.recover.repeats import is_repeated, programs_of
from jaxquant.run.layers import Layer
from jaxquant.run.program import Program

Where = Mapping[str, frozenset[str]]  # step -> the names of the sites that have it


class Seen(NamedTuple):
    """What the float model showed of one tensor.

    Attributes:
      low, high: float32 [N, I], the least and largest value of N samples' I channels, 0 included.
      rows: for each site that reads it, float32 [R, G, K]; see `jaxquant.recover.product`.
    """

    low: Any
    high: Any
    rows: tuple[Any, ...]


class State(NamedTuple):
    """What a look keeps of a tensor, with an axis for each scan over stacked weights around it.

    Attributes:
      seen: what the evaluations of the graph have shown so far.
      places: for each site that reads the tensor, the output positions of its rows, int32 [R].
      steps: how many evaluations there were, int32 [].
    """

    seen: Seen
    places: tuple[Any, ...]
    steps: Any


@dataclasses.dataclass(frozen=True)
class Divisible:
    """An int8 tensor that may be divided by channel, in all layers of its graph.

    Attributes:
      model: of the graph that it is in.
      name: its own, without a layer.
      var: it.
      axes: of its input channels, ascending.
      readers: the sites that read it.
      shared: for each scan over stacked weights around it, whether the layers have one of the
        readers' weights in common, so that they are divided alike.
    """

    model: Model
    name: str
    var: ir.Var
    axes: tuple[int, ...]
    readers: tuple[SiteProduct, ...]
    shared: tuple[bool, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Its shape, with size 1 but along the channels."""
        shape = self.model.graph.shape(self.var)
        return [size if axis in self.axes else 1 for axis, size in enumerate(shape)]

    @property
    def first_reader(self) -> int:
        """The index of the first equation that reads it in int8."""
        return min(product.site.equation for product in self.readers)

    def layers_alike(self) -> list[list[Layer]]:
        """Its layers, those together that are divided alike."""
        found: dict[Layer, list[Layer]] = {}
        for layer in np.ndindex(self.model.scans):
            # What varies in all layers is divided in each as it likes; what they share, in all
            # alike.
            own = tuple(n for n, shared in zip(layer, self.shared, strict=True) if not shared)
            found.setdefault(own, []).append(layer)
        return list(found.values())

    @property
    def look(self) -> Look:
        return Look((self.var,), self._update)

    def start(self, index: Mapping[Layer, Sequence[np.ndarray]]) -> State:
        """The state before any evaluation.

        Args:
          index: layer -> for each reader the output positions of its rows.
        """
        scans = self.model.scans
        shape = jax.ShapeDtypeStruct(self.model.graph.shape(self.var), jnp.float32)
        layers = [index[layer] for layer in np.ndindex(scans)]
        stacked = [
            np.stack(each).reshape(*scans, -1).astype(np.int32)
            for each in zip(*layers, strict=True)
        ]
        # By shapes, without a sample: how large a look is depends on nothing else.
        like = jax.eval_shape(self._seen, shape, tuple(layers[0]))
        empty = jax.tree.map(lambda x: np.zeros((*scans, *x.shape), x.dtype), like)
        return State(empty, tuple(stacked), np.zeros(scans, np.int32))

    def _update(self, state: State, env: evaluate.Environment, real: Real) -> State:
        seen = self._seen(env.read(self.var).astype(jnp.float32), state.places, real)
        # In a loop the rows are drawn from all steps, as they come.
        if is_repeated(self.model):
            seen = _with_step(state, seen)
        return State(seen, state.places, state.steps + 1)

    def _seen(self, x: jax.Array, index: Sequence[Any], real: Real = lambda var: None) -> Seen:
        """The first axis is that of the samples, unless it is one of channels: then x is one.

        Rows of padding are NaN.
        """
        rows = []
        for product, at in zip(self.readers, index, strict=True):
            own, is_real = product.inputs(x, 0, at), product.real(real, at)
            rows.append(own if is_real is None else jnp.where(is_real[:, None, None], own, jnp.nan))
        if (counted := real(self.var)) is not None:
            x = jnp.where(counted, x, 0)
        # Zero is on every grid, so that it counts as seen.
        rest = tuple(a for a in range(1, x.ndim) if a not in self.axes)
        samples = 1 if 0 in self.axes else x.shape[0]
        low, high = (f(x, axis=rest, initial=0).reshape(samples, -1) for f in (jnp.min, jnp.max))
        return Seen(low, high, tuple(rows))


def _with_step(state: State, new: Seen) -> Seen:
    """What the steps so far and another one show."""
    old, rows = state.seen, []
    for number, (before, now) in enumerate(zip(old.rows, new.rows, strict=True)):
        is_new = is_replaced(state.steps, len(now), number)
        rows.append(jnp.where(is_new[:, None, None], now, before))
    low, high = jnp.minimum(old.low, new.low), jnp.maximum(old.high, new.high)
    return Seen(low, high, tuple(rows))


def find_divisible(program: Program, where: Where) -> list[Divisible]:
    """The tensors all of whose readers have one of the steps, inside loops and choices too.

    Not among them are tensors whose integers are moved, compared or averaged, inputs of sites that
    share their weight with a site elsewhere, and of dots whose weight has batch axes.
    """
    programs = list(programs_of(program))
    # Two tensors in front of one stored weight would need different factors in it.
    users: dict[layout.WeightSlot, set[tuple[Program, ir.Var]]] = {}
    for part in programs:
        for site in (s.site for s in part.binding.sites if s.site.name in program.slots):
            for var in site.operands:
                users.setdefault(program.slots[site.name], set()).add((part, var))

    # What is read in float, or by what has no such input, would be equalized with it.
    others = [each.site.name for part in programs for each in part.restored.values()]
    stored = [each for part in programs for each in part.binding.sites]
    others += [each.site.name for each in stored if each.dynamic or each.site.is_lookup]
    barred = {program.slots[name] for name in others if name in program.slots}
    alone = {slot for slot, used in users.items() if len(used) == 1 and slot not in barred}
    return [found for part in programs for found in _in_graph(part, alone, where)]


def _in_graph(program: Program, alone: set[layout.WeightSlot], where: Where) -> Sequence[Divisible]:
    """The tensors of one graph.

    Args:
      program: of the graph.
      alone: the weights that sites behind one tensor have for themselves.
      where: the sites of each step.
    """
    graph, binding = program.graph, program.binding
    readers: dict[ir.Var, list[Site]] = {}
    for site in (s.site for s in binding.sites if not s.dynamic):
        for var in site.operands:
            readers.setdefault(var, []).append(site)

    families = list(binding.forms.family.values())
    found = []
    for var, name in binding.names.items():
        # Its factors go into the weights behind it: all its readers have to have such a weight, and
        # nothing may compare its integers or share their scale.
        sites = readers.get(var, [])
        # A shared scale is one for both: dividing one tensor would divide the other.
        is_alone = families.count(binding.forms.family[var]) == 1
        stored = all(program.slots.get(site.name) in alone for site in sites)
        decided = any(e.index in binding.decisions for e in graph.consumers.get(var, ()))
        if not (sites and is_alone and stored) or decided:
            continue

        # All readers have to agree on what its channels are.
        products = tuple(SiteProduct(graph, site) for site in sites)
        axes = {input_axes(product.site) for product in products}
        if len(axes) > 1 or any(product.reason for product in products):
            continue

        # SmoothQuant is made for dots.
        dots = all(product.site.as_contraction.window is None for product in products)
        asked = where.get("equalization", frozenset())
        if dots:
            asked |= where.get("smoothquant", frozenset())
        if asked.issuperset(site.name for site in sites):
            weights = [site.weight for site in sites if site.weight is not None]
            varying = [program.model.varies_by_layer(weight) for weight in weights]
            shared = tuple(not all(each) for each in zip(*varying, strict=True))
            found.append(Divisible(program.model, name, var, axes.pop(), products, shared))
    return found
