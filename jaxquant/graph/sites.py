"""Find the sites of a graph (its convolutions and dots) and name them.

A site's name is the path of the parameter its weight comes from, without the collection
(`params`) and the leaf (`kernel`): `b1/Conv_0`.  So Flax linen, Flax nnx and plain functions over
nested dicts name the same network alike.  A site without a weight is named after its scope and
kind.  A second use of a name gets `:1`, and so on; no name depends on the batch size.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp

from jaxquant.graph import ir, jax_shim, primitives
from jaxquant.graph import trace as tracing

_COLLECTION = "params"


@dataclasses.dataclass(frozen=True)
class Site:
    """One quantizable operation.

    Attributes:
      name: unique in the model.
      kind: PaddleSlim's name of the operation type: `conv2d`, `depthwise_conv2d`, `mul`, ...
      scope: the joined name stack (module path and named scopes).
      weight_path: the parameter path of its weight, "" where it has none.
      location: the index of its equation; inside control flow, the index of the equation that
        holds the body, the number of the body, and so on inwards.
      output: the tensor that the equation produces; None inside control flow.
      activation: the operand that depends on the inputs; None inside control flow.
      weight: the static operand; None where both operands depend on the inputs.
      weight_position: 0 or 1, the weight's place among the operands.
      inside: the control-flow primitives that hold the site, outermost first; () at the top level.
    """

    name: str
    kind: str
    scope: str
    weight_path: str
    location: tuple[int, ...]
    output: ir.Var | None = None
    activation: ir.Var | None = None
    weight: ir.Var | None = None
    weight_position: int = 1
    inside: tuple[str, ...] = ()

    @property
    def equation(self) -> int:
        """The index of its equation in the (top-level or body) graph that holds it."""
        return self.location[-1]


def find_sites(graph: ir.Graph) -> tuple[Site, ...]:
    """Every convolution and dot of the graph that depends on its inputs, in evaluation order."""
    return _name(list(_collect(graph, (), ())))


def body_graphs(graph: ir.Graph, eqn: ir.Equation) -> list[ir.Graph]:
    """The bodies of a control-flow equation."""
    bodies = jax_shim.sub_bodies(dict(eqn.params))
    return [
        tracing.trace_body(graph, eqn, jaxpr, consts, _feeding(eqn, key, jaxpr))
        for key, jaxpr, consts in bodies
    ]


def _feeding(eqn: ir.Equation, key: str, jaxpr: Any) -> Sequence[Any]:
    """The operands that feed a body's inputs; None for a carry and for what is not known."""
    n, operands = len(jaxpr.invars), list(eqn.inputs)
    if eqn.name == "scan":
        consts, carry = jax_shim.scan_counts(eqn.params)
        return operands[:consts] + [None] * carry + operands[consts + carry :]
    if eqn.name == "while":
        cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        own = operands[:cond] if key == "cond_jaxpr" else operands[cond : cond + body]
        return own + [None] * (n - len(own))
    if eqn.name == "cond":
        return operands[1:]
    if len(operands) == n:
        return operands
    return [None] * n


def _collect(graph: ir.Graph, inside: tuple[str, ...], holder: tuple[int, ...]) -> Iterator[Site]:
    for eqn in graph.equations:
        if eqn.outputs and graph.static[eqn.outputs[0]]:
            continue
        if eqn.name in ("conv_general_dilated", "dot_general"):
            site = _site(graph, eqn, inside, holder)
            if inside:
                site = dataclasses.replace(site, output=None, activation=None, weight=None)
            yield site
        elif jax_shim.sub_bodies(dict(eqn.params)):
            for number, body in enumerate(body_graphs(graph, eqn)):
                yield from _collect(body, (*inside, eqn.name), (*holder, eqn.index, number))


def _site(
    graph: ir.Graph, eqn: ir.Equation, inside: tuple[str, ...], holder: tuple[int, ...]
) -> Site:
    static = [graph.is_static(x) for x in eqn.inputs]
    if eqn.name == "conv_general_dilated":
        position = 1 if static[1] else None
        kind = _conv_kind(eqn, graph.shape(eqn.inputs[1]))
    else:
        position = static.index(True) if any(static) else None
        kind = "mul" if position is not None else "matmul"
    weight = eqn.inputs[position] if position is not None else None
    path = ""
    if isinstance(weight, int) and (sources := graph.sources(weight)):
        path = graph.paths[tracing.largest(graph, sources)]
    activation = eqn.inputs[1 - position if position is not None else 0]
    return Site(
        name="",
        kind=kind,
        scope=eqn.scope,
        weight_path=path,
        location=(*holder, eqn.index),
        output=eqn.outputs[0],
        activation=activation if isinstance(activation, int) else None,
        weight=weight if isinstance(weight, int) else None,
        weight_position=position if position is not None else 1,
        inside=inside,
    )


def _conv_kind(eqn: ir.Equation, kernel_shape: tuple[int, ...]) -> str:
    if any(d != 1 for d in eqn.params["lhs_dilation"]):
        return "conv2d_transpose"
    in_per_group = kernel_shape[eqn.params["dimension_numbers"].rhs_spec[1]]
    if eqn.params["feature_group_count"] > 1 and in_per_group == 1:
        return "depthwise_conv2d"
    return "conv2d"


def _name(sites: Sequence[Site]) -> tuple[Site, ...]:
    paths = {site.weight_path for site in sites if site.weight_path}
    modules = collections.Counter(_module(path) for path in paths)
    seen: collections.Counter[str] = collections.Counter()
    named = []
    for site in sites:
        if site.weight_path:
            base = _module(site.weight_path)
            if modules[base] > 1:  # several weights in one module: their names tell them apart
                base = _without_collection(site.weight_path)
        else:
            base = "/".join(s for s in (site.scope, site.kind) if s)
        count = seen[base]
        seen[base] += 1
        named.append(dataclasses.replace(site, name=f"{base}:{count}" if count else base))
    return tuple(named)


def _without_collection(path: str) -> str:
    head, _, tail = path.partition("/")
    return tail if head == _COLLECTION and tail else path


def _module(path: str) -> str:
    path = _without_collection(path)
    return path.rpartition("/")[0] or path


def activation_root(graph: ir.Graph, site: Site) -> ir.Var:
    """The tensor that a site's activation is a rearrangement of."""
    if site.activation is None:
        raise AssertionError(f"site {site.name} has no activation at the top level")
    return primitives.movement_root(graph, site.activation)


def site_inputs(graph: ir.Graph, sites: Sequence[Site]) -> dict[str, ir.Var]:
    """Tensor name -> tensor, for every float tensor that a site with a weight reads.

    A tensor is named after the first site that reads it: `b1/Conv_0/input`.  Rearrangements
    (reshape, transpose, ...) are seen through, so all readers of one tensor share its name.
    """
    named: dict[ir.Var, str] = {}
    for site in sites:
        if site.activation is None or site.weight is None:
            continue
        root = activation_root(graph, site)
        if jnp.issubdtype(graph.dtype(root), jnp.floating):
            named.setdefault(root, f"{site.name}/input")
    return {name: var for var, name in named.items()}
