"""The calls of a program: what each reads of an evaluation, and what it leaves there."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import platforms
from jaxquant.backends.backend import Call, Residual
from jaxquant.graph import ir
from jaxquant.plan import layout
from jaxquant.plan.binding import Int8Site
from jaxquant.run.fusion import Chain, alone
from jaxquant.run.lowerings import Evaluation


class SiteCall:
    """The call of one chain.

    Attributes:
      chain: what it stands for.
      call: what is computed.
      slot: where its weight is.
      residual_strides: of which positions of what it adds the call takes, where not of all.
    """

    def __init__(
        self,
        graph: ir.Graph,
        chain: Chain,
        zero_points: Mapping[ir.Var, int],
        slot: layout.WeightSlot,
        varies: bool = False,
    ):
        self.chain = chain
        self._equation = graph.equations[chain.site.site.equation]
        # That the loop around it varies, a chain does not know.
        self.call = dataclasses.replace(call_of(graph, chain, zero_points), varies=varies)
        self.slot = slot
        self.residual_strides: tuple[int, ...] | None = None

    def changed(self, call: Call, residual_strides: tuple[int, ...] | None) -> SiteCall:
        """One that computes something else of the same chain."""
        # A copy, since __init__ would find the call from the chain anew.
        other = copy.copy(self)
        other.call, other.residual_strides = call, residual_strides
        return other

    def operands(self, state: Evaluation, linked: Collection[str] = ()) -> dict[str, jax.Array]:
        """What the call reads, of the arrays of the model and of the tensors so far.

        Args:
          state: the evaluation.
          linked: names that are left out.
        """
        site, residual = self.chain.site.site, self.chain.residual
        qparams, quantized = state.qparams, state.quantized

        # Its arrays: the weight is packed where the user has prepared the model for kernels.
        found = {"weight": layout.get(qparams["params"], self.slot.int8)}
        found |= qparams["sites"][site.name]  # multiplier, bias and the like
        if site.as_contraction.choosing is not None:
            found["sizes"] = state.env.read(self._equation.inputs[2])
        if site.name in qparams.get("packed", {}):
            found["packed"] = qparams["packed"][site.name]

        # The grids of its result and of what it adds.
        if self.chain.grid is not None:
            found["inv_scale"] = quantized.inv_scale(self.chain.grid)
        if residual is not None and self.chain.residual_int8:
            found["residual_scale"] = quantized.scale(residual)

        # Tensors, unless a call of the same sequence gives them.
        if "x" not in linked:
            found["x"] = quantized.int8(site.operands[0])
        if residual is not None and "residual" not in linked:
            read = quantized.int8 if self.chain.residual_int8 else quantized.float32
            found["residual"] = self._thinned(jnp.asarray(read(residual)))

        # Inside a scan zero points are arrays: one program serves all layers.
        if self.call.varies:
            found["zero_point"] = quantized.zero_point(site.operands[0])
            if residual is not None and self.chain.residual_int8:
                found["residual_zero_point"] = quantized.zero_point(residual)
            if self.chain.grid is not None:
                found["out_zero_point"] = quantized.zero_point(self.chain.grid)
        return {name: jnp.asarray(value) for name, value in found.items()}

    def _thinned(self, residual: jax.Array) -> jax.Array:
        """What the call adds, at the positions that it gives."""
        if self.residual_strides is None:
            return residual
        return lax.slice(residual, [0] * residual.ndim, residual.shape, self.residual_strides)

    def keep(self, state: Evaluation, results: Sequence[jax.Array]) -> dict[ir.Var, jax.Array]:
        """The float result, if there is one; the int8 one is kept for those that read it.

        Args:
          state: the evaluation.
          results: those of the call; none where they stay inside a sequence.
        """
        # The int8 result is the last one, as `Call.outputs` orders them.
        if results and self.chain.grid is not None:
            state.quantized.put(self.chain.output, results[-1], self.chain.grid)
            # Those who read it in float read what the int8 form stands for, not the exact value.
            if self.chain.is_rounded:
                return {self.chain.output: state.quantized.wide(self.chain.output)}
        return {self.chain.output: results[0]} if results and self.chain.float_out else {}


def goes_on(
    table: platforms.Table, graph: ir.Graph, site: Int8Site, zero_points: Mapping[ir.Var, int]
) -> bool:
    """Whether the call of a site holds what follows it too."""
    if site.site.stored_weight is None:
        return False
    # Of the site alone: whether a kernel has it does not depend on what might follow.
    return platforms.goes_on(table, call_of(graph, alone(graph, site), zero_points))


def call_of(graph: ir.Graph, chain: Chain, zero_points: Mapping[ir.Var, int]) -> Call:
    """What a chain computes.

    Args:
      graph: the traced model.
      chain: the chain; its site has a stored weight.
      zero_points: of the int8 tensors.
    """
    site = chain.site.site
    assert site.weight is not None
    residual = None
    if chain.residual is not None:
        # A float residual has no grid, and so no zero point to take away.
        zero_point = zero_points[chain.residual] if chain.residual_int8 else 0
        residual = Residual(chain.residual_int8, zero_point)
    return Call(
        contraction=site.as_contraction,
        weight_position=site.weight_position,
        weight_shape=graph.shape(site.weight),
        movements=chain.movements,
        channels=chain.channels,
        shape=graph.shape(chain.output),
        zero_point=zero_points[site.operands[0]],
        clamps=chain.clamps,
        residual=residual,
        gives_float=chain.float_out,
        out_zero_point=None if chain.grid is None else zero_points[chain.grid],
    )
