"""Names of sites and of the tensors that they read.

A site's name is the path of the parameter its weight comes from, without the collection
(`params`) and the leaf (`kernel`): `b1/Conv_0`.  So Flax linen, Flax nnx and plain functions over
nested dicts name the same network alike.  A site without a weight is named after its scope and
kind; a product of activations in nnx or a plain function, whose scope tells nothing of the layer,
after the module of what it multiplies too: `blocks/3/attention/bqhd,bkhd->bhqk/matmul`.  A second
use of a name gets `:1`, and so on; no name depends on the batch size.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.sites import Site

COLLECTION = "params"


def name_sites(sites: Sequence[Site]) -> tuple[Site, ...]:
    paths = {site.weight_path for site in sites if site.weight_path}
    modules = collections.Counter(module_of(path) for path in paths)
    # The segments of a scan that is cut have the number that it had, sites behind it the next one.
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    taken: set[str] = set()
    named = []
    for site in sites:
        if site.weight_path:
            base = module_of(site.weight_path)
            if modules[base] > 1:  # several weights in one module: their names tell them apart
                base = without_collection(site.weight_path)
        # Without a weight: what feeds it tells the layer, the scope the place in it.
        else:
            base = "/".join(s for s in (site.feeding, site.scope, site.kind) if s)
        base = _without_segment(base, site)
        counts = seen[base]
        segments = [count for segment, count in counts.items() if segment]
        # A second use outside of segments goes behind all that the segments used.
        count = counts[""] + (counts[site.segment] if site.segment else max(segments, default=0))
        names = (f"{base}:{n}" if n else base for n in itertools.count(count))
        name = next(n for each in names if (n := each + site.segment) not in taken)
        counts[site.segment] += 1
        taken.add(name)
        named.append(dataclasses.replace(site, name=name))
    return tuple(named)


def _without_segment(base: str, site: Site) -> str:
    """A name without the layers that the path of a weight tells of that is cut."""
    return base.replace(site.segment, "", 1) if site.segment else base


def name_lookups(lookups: Sequence[Site], others: Sequence[Site]) -> list[Site]:
    """Names that the other sites do not have; they share those of a weight that they share."""
    # Lookups share modules with dots, so both are counted.
    paths = {site.weight_path for site in (*others, *lookups) if site.weight_path}
    modules = collections.Counter(module_of(path) for path in paths)
    taken = {site.name for site in others}
    named = []
    for site in lookups:
        path = site.weight_path
        base = "/".join(s for s in (site.scope, site.kind) if s)
        # A module that holds the table alone gives its name, as it does for other weights.
        if path:
            base = module_of(path) if modules[module_of(path)] == 1 else without_collection(path)
        base = _without_segment(base, site)
        counts = itertools.chain([base], (f"{base}:{count}" for count in itertools.count(1)))
        name = next(n for name in counts if (n := name + site.segment) not in taken)
        taken.add(name)
        named.append(dataclasses.replace(site, name=name))
    return named


def without_collection(path: str) -> str:
    head, _, tail = path.partition("/")
    return tail if head == COLLECTION and tail else path


def module_of(path: str) -> str:
    """The path of the module that a parameter is in, without the collection."""
    path = without_collection(path)
    return path.rpartition("/")[0] or path


def tensor_names(graph: ir.Graph, sites: Sequence[Site]) -> dict[ir.Var, str]:
    """Names of the tensors that sites read or give.

    What is read is named after the first site that does, `b1/Conv_0/input`; what none reads after
    the site that gives it, up to the end of the functions behind it, `b1/Conv_0/output`.

    Rearrangements (reshape, transpose, ...) are seen through, so that all readers of one tensor
    share its name.  The second operand of a site gives `.../input_1`.  Convolutions and dots
    name before other sites, and rearrangements last: which of these there are may depend on the
    batch (`jnp.matmul` of a batch of one drops its axis).
    """
    named: dict[ir.Var, str] = {}
    # Convolutions first: what they read has to be named alike in every mode and batch.
    for site in sorted(sites, key=_naming_rank):
        for number, operand in enumerate(site.operands):
            name = f"{site.name}/input" + (f"_{number}" if number else "")
            root = primitives.movement_root(graph, operand)
            named.setdefault(root, name)
            named.setdefault(operand, f"{name}:moved")  # where the rearrangement is kept in float
    for site in sorted(sites, key=_naming_rank):
        # Only what is not read by a site is left without a name by now.
        for var in _given(graph, site):
            named.setdefault(var, f"{site.name}/output")
    return named


def _given(graph: ir.Graph, site: Site) -> Iterator[ir.Var]:
    """What a site gives, and what follows from that alone: an epilogue, an activation."""
    var = site.output
    while var is not None:
        yield var
        readers = graph.consumers.get(var, ())
        # A tensor with two readers is given itself; what either makes of it is another one.
        if len(readers) != 1 or not _follows_alone(graph, readers[0], var):
            return
        (var,) = readers[0].outputs


def _follows_alone(graph: ir.Graph, eqn: ir.Equation, var: ir.Var) -> bool:
    """True for a function of each element of a tensor, with constants, and for a rearrangement."""
    if not (primitives.is_elementwise(eqn) or primitives.is_movement(graph, eqn)):
        return False
    return all(x == var or graph.is_static(x) for x in eqn.inputs)


def _naming_rank(site: Site) -> int:
    if site.kind in kinds.DOT_KINDS:
        return 0
    return 2 if kinds.is_layout(site.kind) else 1
