"""Operations that JAX writes as several equations and runtimes have as one operator.

Other than the composites that a plan knows, they are no sites: what an export reads, and what
kernels run in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from jaxquant.graph import attention, few_rows, gelu, ir, layer_norm, matching, shares, softmax

# What finds an operation: a function (graph, last equation); None of other equations.
Find: TypeAlias = Callable[[ir.Graph, ir.Equation], matching.Match | None]

FINDERS: Mapping[str, Find] = {
    "attention": attention.match,
    "few_rows": few_rows.match,
    "gelu": gelu.match,
    "layer_norm": layer_norm.match,
    "shares": shares.match,
    "softmax": softmax.match_operator,
}


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operation of several equations, none of whose inner tensors others read.

    Attributes:
      kind: of the operation, a key of `FINDERS`.
      inputs: the tensors that it reads, those that depend on the model's inputs first.
      members: the indices of its equations, ascending; the last one gives its result.
      params: "attention": layout, scale, fill, biases and masks, see `jaxquant.graph.attention`,
        precisions of its two products; "few_rows": fills, whether a number out of range gives
        NaN (inputs numbers [..., 1] and table [V, K]); "gelu": approximate, "tanh" or "none";
        "layer_norm": axis, epsilon, has_scale and has_bias (inputs [C] behind the first); "shares"
        and "softmax": axis.
    """

    kind: str
    inputs: tuple[ir.Var, ...]
    members: tuple[int, ...]
    params: Mapping[str, Any]


def find_operators(
    graph: ir.Graph, kinds: Collection[str], within: Collection[int] | None = None
) -> dict[int, Operator]:
    """The operations of these kinds by the index of their last equation.

    Where one is inside another, as a normalization without its scale, the larger one counts.

    Args:
      graph: the traced model.
      kinds: keys of `FINDERS`.
      within: the equations that they may consist of; by default all.
    """
    found: dict[int, Operator] = {}
    taken: set[int] = set()
    # From the end, so that the larger operator is found before what lies inside it.
    for eqn in reversed(graph.equations):
        for kind in () if eqn.index in taken or len(eqn.outputs) != 1 else kinds:
            match = FINDERS[kind](graph, eqn)
            if match is None or taken & match.members:
                continue
            # What runs otherwise already (an int8 site, say) cannot be a part of it.
            if within is None or match.members <= set(within):
                members = tuple(sorted(match.members))
                found[eqn.index] = Operator(kind, match.inputs, members, match.params)
                taken |= match.members
    return found
