"""Find the sites of a graph, its quantizable operations, and name them.

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

import jax.numpy as jnp

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph import trace as tracing
from jaxquant.graph.contraction import Axes, Contraction
from jaxquant.graph.feeding import module_feeding
from jaxquant.graph.regions import Region

_COLLECTION = "params"


@dataclasses.dataclass(frozen=True)
class Site:
    """One quantizable operation.

    Attributes:
      name: unique in the model.
      kind: PaddleSlim's name of the operation type: `conv2d`, `depthwise_conv2d`, `mul`, ...
      scope: the joined name stack (module path and named scopes).
      modules: the Flax module classes that the site is in, outermost first.
      weight_path: the parameter path of its weight, "" where it has none.
      location: the index of its equation; inside control flow, the index of the equation that
        holds the body, the number of the body, and so on inwards.
      output: the tensor that the equation produces; None inside control flow, but in the body's
        own model.
      operands: the float tensors that it reads and that depend on the inputs; () inside control
        flow, but in the body's own model.
      contraction: what a convolution or dot does with the axes of its operands; None of another
        operation.
      weight: the static operand of a convolution or dot; None where it has none.
      weight_position: 0 or 1, the weight's place among the operands.
      computes_weight: whether the program computes the weight, so that it is not stored: no
        parameter is in it (the weights of an interpolation), or its shape follows the batch, see
        `jaxquant.graph.batch_sizes`.
      inside: the control-flow primitives that hold the site, outermost first; () at the top level.
      scans: the numbers of layers of the scans over stacked weights around it, outermost first.
      feeding: of a product of activations outside of linen, the path that the modules have in
        common that they come from, without the collection; it is named after that.
      segment: of a scan that is cut, which layers it goes over, "[4:12]"; the name has it too.
    """

    name: str
    kind: str
    scope: str
    modules: tuple[str, ...]
    weight_path: str
    location: tuple[int, ...]
    output: ir.Var | None = None
    operands: tuple[ir.Var, ...] = ()
    contraction: Contraction | None = None
    weight: ir.Var | None = None
    weight_position: int = 1
    computes_weight: bool = False
    inside: tuple[str, ...] = ()
    scans: tuple[int, ...] = ()
    feeding: str = ""
    segment: str = ""

    @property
    def equation(self) -> int:
        """The index of its equation in the (top-level or body) graph that holds it."""
        return self.location[-1]

    @property
    def stored_weight(self) -> ir.Var | None:
        """The weight, where it is stored."""
        return None if self.computes_weight else self.weight

    @property
    def stores_weight(self) -> bool:
        """Whether it has a weight that is stored; of a site inside control flow too."""
        return (
            bool(self.weight_path) and not self.computes_weight and self.kind not in kinds.PRODUCTS
        )

    @property
    def as_contraction(self) -> Contraction:
        """The contraction of a convolution or dot."""
        assert self.contraction is not None, f"site {self.name!r} is no convolution or dot"
        return self.contraction

    @property
    def weight_axes(self) -> Axes:
        """The axes of the weight of a convolution or dot."""
        return self.as_contraction.operands[self.weight_position]

    @property
    def input_axes(self) -> Axes:
        """The axes of what a convolution or dot multiplies its weight by."""
        return self.as_contraction.operands[1 - self.weight_position]

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the weight that run along output channels, ascending: not summed over.

        Of an embedding, whose rows are not summed over either, the one that numbers the rows.
        """
        return (0,) if self.contraction is None else self.weight_axes.kept


def find_sites(root: Region) -> tuple[Site, ...]:
    """Every operation of a known kind that depends on the inputs, in evaluation order.

    Those inside control flow are among them; their tensors are those of the body's graph.
    """
    return _name(list(_collect(root)))


def find_lookups(root: Region, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The embeddings, the rows that are looked up in a weight, beside the other `sites`."""
    lookups = [
        _lookup(region, eqn)
        for region in root.walk()
        for eqn in region.graph.equations
        if _reads(region.graph, eqn)
    ]
    return tuple(_name_lookups(lookups, sites))


def within(site: Site, region: Region) -> Site:
    """A site of a whole model as the model of a body that holds it has it."""
    depth = len(region.location)
    return dataclasses.replace(
        site, location=site.location[depth:], inside=site.inside[len(region.inside) :]
    )


def from_outside(site: Site) -> Site:
    """A site as a model shows it: of one inside control flow without the tensors of the body."""
    if not site.inside:
        return site
    return dataclasses.replace(site, output=None, operands=(), weight=None)


def _collect(region: Region) -> Iterator[Site]:
    graph, composites = region.graph, region.composites.whole
    within = {i for last, whole in composites.items() for i in whole.members if i != last}
    bases, normalising = region.composites.bases, region.composites.normalising
    for eqn in graph.equations:
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
            computes = not graph.sources(found) or found in graph.sized_by_batch
    elif kind in kinds.PRODUCTS:  # named after a parameter too, though none of it is stored
        static_vars = [v for v in eqn.input_vars if graph.static[v]]
        sources = [source for v in static_vars for source in graph.sources(v)]
        path = graph.paths[tracing.largest(graph, sources)] if sources else ""
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
        feeding="/".join(feeding[1:] if feeding[:1] == (_COLLECTION,) else feeding),
        segment=region.segment,
    )


def _name(sites: Sequence[Site]) -> tuple[Site, ...]:
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
                base = _without_collection(site.weight_path)
        else:
            base = "/".join(s for s in (site.feeding, site.scope, site.kind) if s)
        base = _without_segment(base, site)
        counts = seen[base]
        segments = [count for segment, count in counts.items() if segment]
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


def _reads(graph: ir.Graph, eqn: ir.Equation) -> bool:
    return kinds.is_lookup(graph, eqn) and not graph.static[eqn.outputs[0]]


def _is_placed(scope: str) -> bool:
    """Whether a scope tells a layer: not where it holds the equations of `einsum` alone."""
    return any("->" not in part for part in scope.split("/") if part)


def _lookup(region: Region, eqn: ir.Equation) -> Site:
    graph, table = region.graph, eqn.input_vars[0]
    path = tracing.path_of(graph, table)
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


def _name_lookups(lookups: Sequence[Site], others: Sequence[Site]) -> list[Site]:
    """Names that the other sites do not have; they share those of a weight that they share."""
    paths = {site.weight_path for site in (*others, *lookups) if site.weight_path}
    modules = collections.Counter(module_of(path) for path in paths)
    taken = {site.name for site in others}
    named = []
    for site in lookups:
        path = site.weight_path
        base = "/".join(s for s in (site.scope, site.kind) if s)
        if path:
            base = module_of(path) if modules[module_of(path)] == 1 else _without_collection(path)
        base = _without_segment(base, site)
        counts = itertools.chain([base], (f"{base}:{count}" for count in itertools.count(1)))
        name = next(n for name in counts if (n := name + site.segment) not in taken)
        taken.add(name)
        named.append(dataclasses.replace(site, name=name))
    return named


def _without_collection(path: str) -> str:
    head, _, tail = path.partition("/")
    return tail if head == _COLLECTION and tail else path


def module_of(path: str) -> str:
    """The path of the module that a parameter is in, without the collection."""
    path = _without_collection(path)
    return path.rpartition("/")[0] or path


def tensor_names(graph: ir.Graph, sites: Sequence[Site]) -> dict[ir.Var, str]:
    """Names of the tensors that sites read: after the first site that does, `b1/Conv_0/input`.

    Rearrangements (reshape, transpose, ...) are seen through, so that all readers of one tensor
    share its name.  The second operand of a site gives `.../input_1`.  Convolutions and dots
    name before other sites, and rearrangements last: which of these there are may depend on the
    batch (`jnp.matmul` of a batch of one drops its axis).
    """
    named: dict[ir.Var, str] = {}
    for site in sorted(sites, key=_naming_rank):
        for number, operand in enumerate(site.operands):
            name = f"{site.name}/input" + (f"_{number}" if number else "")
            root = primitives.movement_root(graph, operand)
            named.setdefault(root, name)
            named.setdefault(operand, f"{name}:moved")  # where the rearrangement is kept in float
    return named


def _naming_rank(site: Site) -> int:
    if site.kind in kinds.DOT_KINDS:
        return 0
    return 2 if kinds.is_layout(site.kind) else 1
