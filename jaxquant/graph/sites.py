"""A site: one quantizable operation of a model."""

from __future__ import annotations

import dataclasses

from jaxquant.graph import ir, kinds
from jaxquant.graph.contraction import Axes, Contraction
from jaxquant.graph.regions import Region


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
    def is_lookup(self) -> bool:
        """Whether it looks rows up in its weight, by index: an embedding."""
        return self.kind == kinds.LOOKUP_KIND

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

        An embedding sums over nothing: its axis is the one that numbers the rows.
        """
        return (0,) if self.contraction is None else self.weight_axes.kept


def within(site: Site, region: Region) -> Site:
    """A site of a whole model as the model of a body that holds it has it."""
    depth = len(region.location)
    # Both count from the body on.
    return dataclasses.replace(
        site, location=site.location[depth:], inside=site.inside[len(region.inside) :]
    )


def from_outside(site: Site) -> Site:
    """A site as a model shows it: of one inside control flow without the tensors of the body."""
    if not site.inside:
        return site
    # Tensors of a body have numbers of its own, which would be others here.
    return dataclasses.replace(site, output=None, operands=(), weight=None)
