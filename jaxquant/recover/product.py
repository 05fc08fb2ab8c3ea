"""A convolution or dot with a weight as a product of matrices, on chosen output positions.

`R` positions, `G` groups, `K` products a sum, `C` output channels in the weight's order: an output
[R, C] is inputs [R, G, K] times a weight [G, K, C/G].
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.sites import Site
from jaxquant.plan.epilogue import output_channels


@dataclasses.dataclass(frozen=True)
class Product:
    """One site; its input and output have the shapes of the graph."""

    graph: ir.Graph
    site: Site

    @property
    def equation(self) -> ir.Equation:
        return self.graph.equations[self.site.equation]

    @property
    def _is_conv(self) -> bool:
        return self.equation.name == "conv_general_dilated"

    @property
    def reason(self) -> str:
        """Why the site has no such form; "" where it has one."""
        if not self._is_conv and any(self.equation.params["dimension_numbers"][1]):
            return "its weight has batch axes"
        return ""

    @property
    def _output(self) -> tuple[int, ...]:
        return self.graph.shape(self.equation.outputs[0])

    @property
    def _channel_axes(self) -> tuple[int, ...]:
        return output_channels(self.graph, self.site).axes

    @property
    def _position_axes(self) -> tuple[int, ...]:
        return tuple(a for a in range(len(self._output)) if a not in self._channel_axes)

    @property
    def positions(self) -> int:
        """How many output positions there are; the samples of the batch run slowest."""
        return math.prod(self._output[a] for a in self._position_axes)

    @property
    def _groups(self) -> int:
        return int(self.equation.params["feature_group_count"]) if self._is_conv else 1

    def outputs(self, y: jax.Array, index: np.ndarray) -> jax.Array:
        """[R, C] of the site's output, behind the equation itself."""
        rows = y.transpose((*self._position_axes, *self._channel_axes))
        return rows.reshape(self.positions, -1)[index]

    def inputs(self, x: jax.Array, zero: int, index: np.ndarray) -> jax.Array:
        """float32 [R, G, K]: the values that enter each sum, less the zero point."""
        if self._is_conv:
            return self._patches(x, zero, index)
        contract = self.equation.params["dimension_numbers"][0][1 - self.site.weight_position]
        rest = [a for a in range(x.ndim) if a not in contract]
        rows = x.transpose((*rest, *contract)).reshape(self.positions, -1)[index]
        return (rows.astype(jnp.float32) - jnp.float32(zero))[:, None, :]

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """[G, K, C/G] from a weight."""
        ordered = weight.transpose(self._weight_order)
        if not self._is_conv:
            return ordered.reshape(1, self._terms(weight.shape), -1)
        groups = self._groups
        return ordered.reshape(groups, weight.shape[self._weight_order[0]] // groups, -1).transpose(
            0, 2, 1
        )

    def weight(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The weight of this shape from [G, K, C/G]."""
        order = self._weight_order
        ordered = matrix.transpose(0, 2, 1) if self._is_conv else matrix
        return ordered.reshape([shape[a] for a in order]).transpose(np.argsort(order))

    @property
    def _weight_order(self) -> tuple[int, ...]:
        if self._is_conv:
            return tuple(self.equation.params["dimension_numbers"].rhs_spec)
        contract = self.equation.params["dimension_numbers"][0][self.site.weight_position]
        rank = len(self.graph.shape(self.equation.inputs[self.site.weight_position]))
        return (*contract, *(a for a in range(rank) if a not in contract))

    def _terms(self, shape: tuple[int, ...]) -> int:
        contract = self.equation.params["dimension_numbers"][0][self.site.weight_position]
        return math.prod(shape[a] for a in contract)

    def _patches(self, x: jax.Array, zero: int, index: np.ndarray) -> jax.Array:
        """What the window holds at each position; padding and dilation hold zeros."""
        params, spec = self.equation.params, self.equation.params["dimension_numbers"]
        kernel = self.graph.shape(self.equation.inputs[1])
        window = [kernel[a] for a in spec.rhs_spec[2:]]
        axes = self._position_axes
        places = np.unravel_index(index, [self._output[a] for a in axes])
        at = dict(zip(axes, places, strict=True))
        x = x.transpose((spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
        taps = []
        for offset in itertools.product(*map(range, window)):
            where, inside = [], np.ones(len(index), bool)
            for d, tap in enumerate(offset):
                step = at[spec.out_spec[2 + d]] * params["window_strides"][d]
                step = step + tap * params["rhs_dilation"][d] - params["padding"][d][0]
                source, between = np.divmod(step, params["lhs_dilation"][d])
                inside &= (between == 0) & (source >= 0) & (source < x.shape[1 + d])
                where.append(np.clip(source, 0, x.shape[1 + d] - 1))
            rows = x[(at[spec.out_spec[0]], *where)].astype(jnp.float32) - jnp.float32(zero)
            taps.append(jnp.where(inside[:, None], rows, jnp.float32(0)))
        stacked = jnp.stack(taps, axis=-1)  # [R, input channels, taps]
        return stacked.reshape(len(index), self._groups, -1)
