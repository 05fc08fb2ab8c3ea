"""Find the sites of a graph, its quantizable operations."""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from jaxquant.graph import ir, kinds
from jaxquant.graph import trace as tracing
from jaxquant.graph.feeding import module_feeding
from jaxquant.graph.naming import COLLECTION, name_lookups, name_sites
from jaxquant.graph.regions import Region
from jaxquant.graph.sites import Site


def find_sites(root: Region) -> tuple[Site, ...]:
    """Every operation of a known kind that depends on the inputs, in evaluation order.

    Those inside control flow are among them; their tensors are those of the body's graph.  The
    embeddings, rows that are looked up in a weight, get their names behind all others: a layer
    that shares its weight with one is called after it.
    """
    sites = name_sites(list(_collect(root)))
    lookups = [
        _lookup(region, eqn)
        for region in root.walk()
        for eqn in region.graph.equations
        # A static lookup is a constant.
        if kinds.is_lookup(region.graph, eqn) and not region.graph.static[eqn.outputs[0]]
    ]
    found = (*sites, *name_lookups(lookups, sites))
    # By the place: a lookup and a site of other kinds are found apart.
    return tuple(sorted(found, key=lambda site: site.location))


def _collect(region: Region) -> Iterator[Site]:
    graph, composites = region.graph, region.composites.whole
    # A composite is one site, at its last equation; those inside it are none.
    within = {i for last, whole in composites.items() for i in whole.members if i != last}
    bases, normalising = region.composites.bases, region.composites.normalising
    for eqn in graph.equations:
        # What is static is computed once, before any call.
        if eqn.index in within or (eqn.outputs and graph.static[eqn.outputs[0]]):
            continue
        if eqn.index in composites:
            operands: tuple[ir.Var, ...] = (composites[eqn.index].source,)
            kind = composites[eqn.index].kind
        else:
            operands, kind = _float_operands(graph, eqn), kinds.kind_of(graph, eqn)
        if kind in _ELEMENTWISE and eqn.outputs[0] in bases:
            continue  # part of an activation function or of an affine map
        if eqn.index in normalising:
            continue  # the mean in x - mean(x), and what is made of it
        if kind and _has_floats(graph, eqn):
            yield _site(region, eqn, kind, operands)
        elif not kind:
            # No kind: a loop, a choice or a call that stays, whose body has sites of its own.
            for body in region.bodies(eqn):
                yield from _collect(body)


def _classes_of(graph: ir.Graph, weight_path: str) -> tuple[str, ...]:
    """The classes of the nnx modules that a parameter is in, outermost first."""
    parts = weight_path.split("/")
    prefixes = ("/".join(parts[:n]) for n in range(len(parts)))
    return tuple(graph.classes[p] for p in prefixes if p in graph.classes)


# Of these, only operations of two different tensors are sites.
_ELEMENTWISE = frozenset((*kinds.ELEMENTWISE_KINDS, *kinds.COMPARISON_KINDS))


def _float_operands(graph: ir.Graph, eqn: ir.Equation) -> tuple[ir.Var, ...]:
    """The operands that depend on the inputs and hold floats."""
    return tuple(
        v
        for v in eqn.input_vars
        if not graph.static[v] and jnp.issubdtype(graph.dtype(v), jnp.floating)
    )


def _has_floats(graph: ir.Graph, eqn: ir.Equation) -> bool:
    if eqn.index in graph.contractions:
        return True  # always reported, whatever the dtype
    return bool(_float_operands(graph, eqn))


def _site(region: Region, eqn: ir.Equation, kind: str, operands: tuple[ir.Var, ...]) -> Site:
    graph = region.graph
    position, weight, path, computes = 1, None, "", False
    contraction = graph.contractions.get(eqn.index)
    if contraction is not None:
        static = [graph.is_static(x) for x in eqn.inputs]
        if static[0] and contraction.takes_weight_first:
            position = 0
        found = eqn.inputs[position]
        if static[position] and isinstance(found, int):
            weight = found
            path = tracing.path_of(graph, found)
            # A weight of no parameter, or one that follows the batch size, cannot be stored.
            computes = not graph.sources(found) or found in graph.sized_by_batch
    elif kind in kinds.PRODUCTS:  # named after a parameter too, though none of it is stored
        static_vars = [v for v in eqn.input_vars if graph.static[v]]
        sources = [source for v in static_vars for source in graph.sources(v)]
        path = graph.paths[tracing.largest(graph, sources)] if sources else ""
    # A product of activations has no weight to be named after: it takes the module's that feeds it.
    feeding: tuple[str, ...] = ()
    if contraction is not None and weight is None and not _is_placed(eqn.scope):
        feeding = module_feeding(region, eqn)
    return Site(
        name="",
        kind=kind,
        scope=eqn.scope,
        modules=eqn.modules or _classes_of(graph, path or "/".join((*feeding, ""))),
        weight_path=path,
        location=(*region.location, eqn.index),
        output=eqn.outputs[0],
        operands=operands,
        contraction=contraction,
        weight=weight,
        weight_position=position,
        computes_weight=computes,
        inside=region.inside,
        feeding="/".join(feeding[1:] if feeding[:1] == (COLLECTION,) else feeding),
        segment=region.segment,
    )


def _is_placed(scope: str) -> bool:
    """Whether a scope tells a layer: not where it holds the equations of `einsum` alone."""
    return any("->" not in part for part in scope.split("/") if part)


def _lookup(region: Region, eqn: ir.Equation) -> Site:
    graph, table = region.graph, eqn.input_vars[0]
    path = tracing.path_of(graph, table)
    # A lookup has no input that could be quantized: its operand is the table.
    return Site(
        name="",
        kind=kinds.LOOKUP_KIND,
        scope=eqn.scope,
        modules=eqn.modules or _classes_of(graph, path),
        weight_path=path,
        location=(*region.location, eqn.index),
        output=eqn.outputs[0],
        weight=table,
        weight_position=0,
        inside=region.inside,
        segment=region.segment,
    )
