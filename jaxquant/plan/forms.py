"""Which tensors of a graph have an int8 form, where it is made, and which share a scale.

`jaxquant.plan.form_search` alone decides where int8 starts and stops.  A tensor is made int8 where
an int8 site needs it; operations that select or move values hand the int8 form through, backwards
from who needs it and forwards from where it is, and tie the scales of what they read and give (a
union).  Nothing here looks at data.

The inputs of a concatenation share one scale: the result has one, and an input that only the
concatenation reads would gain nothing from another.  One that no int8 site reads behind it stays
float.  Where an input loses too much on the scale of its neighbours, the plan bars the
concatenation (`jaxquant.plan.evenness`); what it gives is then int8 for the sites that cannot do
without, and everything else reads it in float.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from jaxquant.graph import ir


@dataclasses.dataclass(frozen=True, eq=False)
class Forms:
    """The int8 forms of a graph.

    Attributes:
      entries: the tensors that are quantized from float, in the order of discovery.
      int8: every tensor with an int8 form, entries included.
      moves: the indices of the equations that hand int8 through.
      reads_int8: the indices of float equations that read the int8 form of their operands.
      family: int8 tensor -> the tensor that stands for all that share its scale.
      rounded: the entries that everybody reads as what their int8 form stands for.
    """

    entries: tuple[ir.Var, ...]
    int8: frozenset[ir.Var]
    moves: frozenset[int]
    reads_int8: frozenset[int]
    family: Mapping[ir.Var, ir.Var]
    rounded: frozenset[ir.Var] = frozenset()

    @functools.cached_property
    def heads(self) -> Mapping[ir.Var, ir.Var]:
        """Every int8 tensor -> the first entry of its family."""
        first: dict[ir.Var, ir.Var] = {}
        for entry in self.entries:
            first.setdefault(self.family[entry], entry)
        return {var: first[family] for var, family in self.family.items()}
