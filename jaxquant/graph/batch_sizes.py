"""Which weights a model makes to the size of the batch, or to another size of its inputs.

A learned query that is broadcast along the batch (Perceiver, DETR, SigLIP's pooling head) is
static, as a weight is, but its shape belongs to the batch that was traced.  Where it only holds
copies along those axes, it is stored once (`jaxquant.graph.copies`).  Where the batch is mixed with
other axes (queries [B * Q, D], the merged heads [B * H, Q, D]) nothing of it can be stored: the
program computes it for the batch at hand.

One trace does not show this: with a batch of one, a broadcast along it leaves no equation, and
`jnp.matmul` drops the axis.  So models with such operands are traced again, with a batch of one and
with twice the batch.  Rows of a table that are looked up by the positions of a text (relative
position embeddings) have its length; where the data has texts of several lengths, the model is
traced for those too.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxquant.graph import copies, ir
from jaxquant.graph.model import FloatModel, Model
from jaxquant.graph.sites import Site


def trace_with_batch_sizes(
    source: FloatModel, inputs: tuple[Any, ...], others: Sequence[tuple[Any, ...]] = ()
) -> Model:
    """The model for some inputs, with `sized_by_batch` of its graph found.

    A model that takes no other batch has no such operand.

    Args:
      source: the float model.
      inputs: arrays or `ShapeDtypeStruct`s.
      others: inputs that the model takes too, of any shapes.
    """
    model = source.trace(inputs)
    graph = model.graph
    # A second trace costs time: only where a weight may be made from a size of the inputs.
    suspects = [site for site in model.sites if _may_follow(graph, site)]
    found: set[ir.Var] = set()
    for other in _traces(source, inputs, others) if suspects else ():
        # Sites are the same ones by name: the graphs of two traces have numbers of their own.
        there = {site.name: site for site in other.sites}
        found |= {
            site.weight
            for site in suspects
            if site.weight is not None
            and site.name in there
            and _is_sized_by_batch(graph, site, other.graph, there[site.name])
        }
    if not found:
        return model
    graph = dataclasses.replace(graph, sized_by_batch=frozenset(found))
    return dataclasses.replace(model, graph=graph)


def _traces(
    source: FloatModel, inputs: tuple[Any, ...], others: Sequence[tuple[Any, ...]]
) -> Iterator[Model]:
    """The model for other batch sizes, as far as it takes them, and for other inputs."""
    size = batch_size(inputs)
    # Twice the batch, or a batch of one: whatever grows differs in one of them.
    for other_size in (1, 2 * size or 2) if size is not None else ():
        if other_size == size:
            continue
        if (resized := trace_for(source, inputs, other_size)) is not None:
            yield resized
    # The trace for the inputs is kept, so that this is no third one.
    own = source.trace(inputs)
    yield from (model for model in map(source.trace, others) if model is not own)


def _may_follow(graph: ir.Graph, site: Site) -> bool:
    """False for a parameter, or its transpose, in a dot without batch axes: the common layer."""
    if site.weight is None or not graph.sources(site.weight):
        return False
    has_batch_axes = site.contraction is not None and site.contraction.has_batch
    var = site.weight
    # A transpose of a parameter is as good as the parameter.
    while (made := graph.producer.get(var)) is not None and made.name == "transpose":
        var = made.input_vars[0]
    return has_batch_axes or var not in graph.paths


def _is_sized_by_batch(graph: ir.Graph, site: Site, other: ir.Graph, twin: Site) -> bool:
    """True where the operation differs, or the weight, but not by copies along batch axes."""
    if twin.weight is None or site.weight is None:
        return True
    here, there = graph.shape(site.weight), other.shape(twin.weight)
    if _arrangement(graph, site) != _arrangement(other, twin):
        return True
    # Sizes that differ along shared axes are numbers of copies.
    differing = {d for d, (a, b) in enumerate(zip(here, there, strict=True)) if a != b}
    shared = {*shared_axes(graph, site)} & {*shared_axes(other, twin)}
    return not differing <= shared


def _arrangement(graph: ir.Graph, site: Site) -> Any:
    """What an operation does with the axes of its operands, whatever their sizes."""
    if site.contraction is None:  # an embedding: the rank of its indices says it
        return len(graph.shape(graph.equations[site.equation].outputs[0]))
    return site.contraction.axes


def shared_axes(graph: ir.Graph, site: Site) -> tuple[int, ...]:
    """The batch axes of a dot along which its weight holds copies: it is stored with size 1 there.

    A true batch axis of a weight (an ensemble of layers) is none of them.
    """
    if site.weight is None or site.contraction is None:
        return ()
    return tuple(sorted(set(site.weight_axes.batch) - copies.varying_axes(graph, site.weight)))


def batch_size(inputs: Any) -> int | None:
    """The length of the first axis that most inputs share."""
    structs = map(ir.struct, jax.tree.leaves(inputs))
    lengths = [x.shape[0] for x in structs if x.shape]
    return collections.Counter(lengths).most_common(1)[0][0] if lengths else None


def trace_for(source: FloatModel, inputs: tuple[Any, ...], size: int) -> Model | None:
    """The model for another batch size; None where it takes no such batch."""
    present = batch_size(inputs)

    def resized(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_batch = x.shape and x.shape[0] == present
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) if is_batch else x

    try:
        return source.trace(jax.tree.map(resized, jax.tree.map(ir.struct, inputs)))
    except Exception:  # whatever the model says of another batch size
        return None
