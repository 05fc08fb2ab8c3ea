"""Who reads what a concatenation or a padding joins, where its parts need scales of their own."""

from __future__ import annotations

from collections.abc import Sequence

from jaxquant.graph import ir, kinds, primitives
from jaxquant.graph.composites import PATTERNS
from jaxquant.graph.model import Model
from jaxquant.graph.sites import Site
from jaxquant.plan import behaviours
from jaxquant.plan.binding import Binding
from jaxquant.plan.forms import Forms
from jaxquant.plan.inputs import input_axes
from jaxquant.plan.plan import FLOAT


class Readers:
    """Who reads what a concatenation gives."""

    def __init__(self, model: Model, sites: Sequence[Site], forms: Forms):
        self._graph = model.graph
        self._forms = forms
        self._sites = {site.equation: site for site in sites if not site.inside}
        # A softmax, say, is several equations: what reads its operand is the first of them, and no
        # site.
        self._composite = {
            var: site for site in self._sites.values() if site.kind in PATTERNS
            for var in site.operands
        }  # fmt: skip
        self._bases = model.composites.bases
        self._normalising = model.composites.normalising

    def of(self, eqn: ir.Equation) -> set[str]:
        """The sites that shall read the result of a concatenation in float.

        Convolutions and dots that sum over the joined axis are not among them: they quantize it,
        each part on a scale of its own where that lessens their error.
        """
        found: set[str] = set()
        self._follow(eqn.outputs[0], _joined_axes(eqn), found)
        return found

    def _follow(self, var: ir.Var, axes: frozenset[int] | None, found: set[str]) -> None:
        """Add the sites that shall read a tensor in float to `found`.

        Args:
          var: the tensor.
          axes: those along which its parts lie; None behind a function of it, whose parts are
            read by convolutions and dots as they come.
          found: the names of sites.
        """
        if var in self._composite:
            found.add(self._composite[var].name)
        for user in self._graph.consumers.get(var, ()):
            self._read(user, axes, found)

    def _read(self, user: ir.Equation, axes: frozenset[int] | None, found: set[str]) -> None:
        graph, site = self._graph, self._sites.get(user.index)
        behaviour = behaviours.behaviour_of(site.kind, user) if site is not None else ""
        # A stored weight can take the factors of its channels back; a sum without one cannot.
        if site is not None and behaviour == behaviours.ACCUMULATE:
            stored = site.stored_weight is not None
            # Behind a function the parts are not told apart, but a stored weight takes them as they
            # come.
            if not (stored and (axes is None or _sums_over(site, axes))):
                found.add(site.name)
        elif site is not None and (
            behaviour == behaviours.DECIDE or site.kind in kinds.ELEMENTWISE_KINDS
        ):
            found.add(site.name)
        elif user.index in self._forms.moves:
            if kinds.kind_of(graph, user) in ("slice", "gather"):
                return  # parts come out again, each to be judged by itself
            if site is not None and not primitives.is_movement(graph, user):
                found.add(site.name)

            # The parts go on along the axes that they have behind the movement.
            moved = None if axes is None else primitives.follow_axes(graph, user, axes)
            for output in user.outputs:
                self._follow(output, moved, found)
        elif user.index not in self._normalising and user.outputs[0] in self._bases:
            self._follow(user.outputs[0], None, found)


def readers_of_joined(binding: Binding) -> set[str]:
    """The convolutions and dots that read what a concatenation in float gives, or a function of it.

    Their input channels are tried with scales of their own: see `jaxquant.recover.steps`.
    """
    model, graph = binding.model, binding.graph
    planned = binding.plan.sites
    left = {site.name for site in planned if site.status == FLOAT and site.kind == "concat"}
    joined = {site.equation for site in model.sites if site.name in left and not site.inside}
    bases = model.composites.bases

    # Back from an operand, through what keeps the range of values as it is.
    def is_joined(var: ir.Var) -> bool:
        while (eqn := graph.producer.get(var)) is not None:
            if eqn.index in joined:
                return True
            if var in bases and bases[var] != var:
                # A composite, a GELU say, is stepped over whole, to what it is a function of.
                var = bases[var]
            elif eqn.name in _KEEPING or primitives.is_movement(graph, eqn):
                var = eqn.input_vars[0]
            else:
                return False
        return False

    return {
        int8_site.site.name
        for int8_site in binding.sites
        if any(is_joined(var) for var in int8_site.site.operands)
    }


_KEEPING = frozenset({"pad", "reduce_max", "reduce_window_max"})  # channels stay apart


def _joined_axes(eqn: ir.Equation) -> frozenset[int]:
    """The axes along which a concatenation or a padding lays things beside each other."""
    if eqn.name == "pad":
        config = eqn.params["padding_config"]
        return frozenset(axis for axis, pads in enumerate(config) if any(pads))
    return frozenset({int(eqn.params["axis" if eqn.name == "stack" else "dimension"])})


def _sums_over(site: Site, axes: frozenset[int]) -> bool:
    """True for a convolution or dot whose every output sums over all of these axes of its input."""
    return site.as_contraction.feature_groups == 1 and axes <= frozenset(input_axes(site))
