"""Where a model mixes the samples of a batch: statistics over the batch.

A sample runs along the axes whose length grows with the batch size, so the model is traced for two
batch sizes and both graphs are read side by side; no primitive needs a rule of its own for that.  A
batch normalization in training mode is then a reduction along such an axis whose result comes back
to tensors that have the axis.

The first axis of the inputs need not be a batch: it is the height of a single image, the positions
of a single text, the nodes of a graph.  What such models do with it, a model of independent samples
does not: convolve, contract or scan along it, or compare each entry with each other.  So where that
is found nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from jaxquant.graph import ir
from jaxquant.graph.layer_names import layer_of
from jaxquant.graph.model import Model
from jaxquant.graph.regions import CONTROL_FLOW, Region


class Mixing(NamedTuple):
    """An operation that makes a sample's result depend on the others of its batch.

    Attributes:
      layer: how a message names its place, "BatchNorm 'bn1'".
      sums: True for a sum (or a mean) of floats, False for a largest value, a count, ...
      outputs: the positions of the model's outputs, flattened, that depend on it and have the axis
        of the samples, with that axis.
    """

    layer: str
    sums: bool
    outputs: Mapping[int, int]


class _Origin(NamedTuple):
    layer: str
    sums: bool


class _NoBatch(Exception):
    """The axis is not one of independent samples, or the two graphs differ."""


def find_mixing(model: Model, doubled: Model) -> Mixing | None:
    """The first statistic over the batch that reaches an output of single samples; None without.

    Args:
      model: the model, traced for a batch.
      doubled: the same, traced for twice the batch.
    """
    graph = model.graph
    pair = _Pair(model.root, doubled.root, graph.classes)
    try:
        reached = _follow(pair, {})
    except _NoBatch:
        return None
    outputs: dict[int, int] = {}
    origins = []
    # Outputs without an axis of samples (a loss, say) may well depend on all of them.
    for position, atom in enumerate(graph.outputs):
        axes = pair.growing(atom, doubled.graph.outputs[position])
        if isinstance(atom, int) and atom in reached and axes:
            outputs[position] = axes[0]
            origins.append(reached[atom])
    # A sum is what a normalization takes, so it goes before a count in the message.
    return Mixing(*_foremost(origins), outputs) if outputs else None


def may_mix(model: Model, size: int) -> bool:
    """Whether anything is reduced along an axis that could be made of `size` samples.

    Quick, and needs no second trace: of most networks it is False.
    """
    return any(
        # One size a multiple of the other: samples may be grouped, or have several rows each.
        length % size == 0 or size % length == 0
        for region in (each.graph for each in model.regions)
        for eqn in region.equations
        if not all(region.is_static(x) for x in eqn.inputs)
        for length in (region.shape(eqn.inputs[0])[k] for k in _reduced(eqn))
        if length
    )


class _Pair(NamedTuple):
    """A region in the graphs of both batch sizes; their equations correspond."""

    first: Region
    second: Region
    classes: Mapping[str, str]  # of the whole model

    @property
    def one(self) -> ir.Graph:
        return self.first.graph

    @property
    def two(self) -> ir.Graph:
        return self.second.graph

    def growing(self, atom: ir.Atom, other: ir.Atom) -> tuple[int, ...]:
        """The axes that grow with the batch."""
        shapes = self.one.shape(atom), self.two.shape(other)
        if len(shapes[0]) != len(shapes[1]):
            raise _NoBatch
        return tuple(k for k, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b)

    def equations(self) -> Iterator[tuple[ir.Equation, ir.Equation]]:
        # JAX leaves equations out for some sizes; then the two cannot be compared.
        if [e.name for e in self.one.equations] != [e.name for e in self.two.equations]:
            raise _NoBatch
        return zip(self.one.equations, self.two.equations, strict=True)

    def bodies(self, eqn: ir.Equation, other: ir.Equation) -> list[_Pair]:
        bodies = self.first.bodies(eqn), self.second.bodies(other)
        return [_Pair(*both, self.classes) for both in zip(*bodies, strict=True)]


def _follow(pair: _Pair, reached: Mapping[ir.Var, _Origin]) -> dict[ir.Var, _Origin]:
    """The tensors of a region that depend on a statistic over the batch.

    Args:
      pair: the region.
      reached: those of its inputs that do.
    """
    found = dict(reached)
    # Two traces with different batches: an axis whose size differs is one that samples lie along.
    for eqn, other in pair.equations():
        # Static tensors depend on no sample.
        if not eqn.outputs or pair.one.static[eqn.outputs[0]]:
            continue
        axes = [pair.growing(x, y) for x, y in zip(eqn.inputs, other.inputs, strict=True)]
        if _treats_as_one(pair, eqn, other, axes):
            raise _NoBatch
        if eqn.name in CONTROL_FLOW:
            found.update(_through_bodies(pair, eqn, other, found))
        else:
            origins = [found[v] for v in eqn.input_vars if v in found]
            # A reduction over samples is where the dependence begins; all behind it inherits it.
            if axes and {*_reduced(eqn)} & {*axes[0]}:
                layer = layer_of(pair.one, eqn, pair.classes)
                origins.append(_Origin(layer, _sums_floats(pair.one, eqn)))
            if origins:
                found.update((var, _foremost(origins)) for var in eqn.outputs)
        if any(len(pair.growing(*vars)) > 1 for vars in zip(eqn.outputs, other.outputs)):
            raise _NoBatch  # samples against samples: a table of pairs
    return found


def _foremost(origins: Iterable[_Origin]) -> _Origin:
    """The first sum, which a normalization takes; else the first."""
    return max(origins, key=lambda origin: origin.sums)


def _through_bodies(
    pair: _Pair, eqn: ir.Equation, other: ir.Equation, found: Mapping[ir.Var, _Origin]
) -> dict[ir.Var, _Origin]:
    """The outputs of a control-flow equation that depend on a statistic over the batch."""
    outputs: dict[ir.Var, _Origin] = {}
    for body in pair.bodies(eqn, other):
        region = body.first
        # When a loop stops may depend on all samples without mixing them.
        if region.key == "cond_jaxpr":
            continue  # it gives no value, only when to stop
        # A body is followed like a region of its own, with what its operands depend on.
        feeding = [found.get(x) if isinstance(x, int) else None for x in region.operands]
        carries = region.carries
        while True:  # what a step leaves in the carry, the next one reads
            given = {v: o for v, o in zip(region.arguments, feeding, strict=True) if o is not None}
            inner = _follow(body, given)
            results = [inner.get(x) if isinstance(x, int) else None for x in body.one.outputs]
            new = {k: results[out] for k, out in carries.items() if results[out] and not feeding[k]}
            if not new:
                break
            for k, origin in new.items():
                feeding[k] = origin
        reached = zip(eqn.outputs, results, strict=True)
        outputs.update((var, origin) for var, origin in reached if origin is not None)
    return outputs


def _treats_as_one(
    pair: _Pair, eqn: ir.Equation, other: ir.Equation, axes: Sequence[Sequence[int]]
) -> bool:
    """Whether an operation takes what grows with the batch for parts of one thing.

    It contracts them, slides a window over them, sorts them or goes through them in their order.
    """
    if not any(axes):
        return False
    params = eqn.params
    if (contraction := pair.one.contractions.get(eqn.index)) is not None:
        if contraction.feature_groups != pair.two.contractions[other.index].feature_groups:
            return False  # `jax.vmap` makes a group of each sample
        summed = [set(own.contracted) for own in contraction.operands]
        # A window slides along the axes of the first operand.
        summed[0] |= set(contraction.operands[0].window)
        # Contracting over samples, or a window along them, mixes them.
        return any(own & {*grow} for own, grow in zip(summed, axes, strict=False))
    if eqn.name == "scan":
        # A scan over positions of one text has another length for a longer text.
        return params["length"] != other.params["length"] and _carry_reads_steps(pair, eqn)
    if eqn.name.startswith("reduce_window") and "window_dimensions" in params:
        return any(params["window_dimensions"][k] > 1 for k in axes[0])
    if eqn.name.startswith("cum"):
        return params["axis"] in axes[0]
    return eqn.name == "sort" and params["dimension"] in axes[0]


def _carry_reads_steps(pair: _Pair, eqn: ir.Equation) -> bool:
    """Whether what one step of a scan sees gets to the next one."""
    (region,) = pair.first.bodies(eqn)
    body = region.graph
    carried = [x for k in region.carries.values() if isinstance(x := body.outputs[k], int)]
    read = {v for e in ir.upstream(body, carried) for v in e.input_vars} | {*carried}
    slices = [region.arguments[k] for k in region.scanned]
    return any(not body.static[v] and v in read for v in slices)


def _reduced(eqn: ir.Equation) -> Sequence[int]:
    """The axes that a reduction takes together; () for what is none."""
    if eqn.name.startswith(("reduce", "arg")) or eqn.name in ("psum", "pmax", "pmin"):
        # Of a mesh, axes are named, and are not those of samples.
        axes = eqn.params.get("axes", eqn.params.get("dimensions", ()))
        return tuple(k for k in axes if isinstance(k, int))  # of a mesh they have names
    return ()


def _sums_floats(graph: ir.Graph, eqn: ir.Equation) -> bool:
    return eqn.name in ("reduce_sum", "psum") and jnp.issubdtype(
        graph.dtype(eqn.outputs[0]), jnp.floating
    )
