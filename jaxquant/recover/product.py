"""A convolution or dot with a weight as a product of matrices, on chosen output positions.

`R` positions, `G` groups, `K` products a sum, `C` output channels in the weight's order: an output
[R, C] is inputs [R, G, K] times a weight [G, K, C/G].
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.contraction import Window
from jaxquant.graph.sites import Site
from jaxquant.plan.epilogue import output_channels

Index: TypeAlias = np.ndarray | jax.Array  # int [R], of output positions


@dataclasses.dataclass(frozen=True)
class SiteProduct:
    """One site; its input and output have the shapes of the graph."""

    graph: ir.Graph
    site: Site

    @property
    def reason(self) -> str:
        """Why the site has no such form; "" where it has one."""
        if self.site.as_contraction.choosing is not None:
            return "its rows choose their weight"
        return "its weight has batch axes" if self.site.as_contraction.has_batch else ""

    @property
    def output(self) -> ir.Var:
        """The tensor that the convolution or dot itself gives."""
        assert self.site.output is not None, "a site inside control flow has no such form"
        return self.site.output

    @property
    def _output(self) -> tuple[int, ...]:
        return self.graph.shape(self.output)

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

    def real(self, real: Callable[[ir.Var], jax.Array | None], index: Index) -> jax.Array | None:
        """bool [R], which rows belong to no padding; None where all of them count.

        Args:
          real: gives which entries of a tensor do.
          index: of the rows.
        """
        entries = real(self.output)
        if entries is None:
            return None
        whole = jnp.broadcast_to(entries, self._output)
        # Any channel tells of its row: padding runs along positions.
        return self.outputs(whole, index).any(axis=1)

    def outputs(self, y: jax.Array, index: Index) -> jax.Array:
        """[R, C] of the site's output, behind the equation itself."""
        rows = y.transpose((*self._position_axes, *self._channel_axes))
        return rows.reshape(self.positions, -1)[index]

    def inputs(self, x: jax.Array, zero: int | jax.Array, index: Index) -> jax.Array:
        """float32 [R, G, K]: the values that enter each sum, less the zero point."""
        if (window := self.site.as_contraction.window) is not None:
            return self._patches(window, x, zero, index)
        own = self.site.input_axes
        rows = x.transpose((*own.free, *own.contracted)).reshape(self.positions, -1)[index]
        # Without a window there is one group, and each row is contiguous.
        return (rows.astype(jnp.float32) - jnp.float32(zero))[:, None, :]

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """[G, K, C/G] from a weight."""
        ordered, own = weight.transpose(self._weight_order), self.site.weight_axes

        # A kernel's outputs are in groups one after the other.
        if self._sums_last:
            groups = self.site.as_contraction.feature_groups
            rows = ordered.reshape(groups, weight.shape[own.free[0]] // groups, -1)
            return rows.transpose(0, 2, 1)
        return ordered.reshape(1, math.prod(weight.shape[a] for a in own.contracted), -1)

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """G, K, C/G."""
        assert self.site.weight is not None
        shape, own = self.graph.shape(self.site.weight), self.site.weight_axes
        groups = self.site.as_contraction.feature_groups if self._sums_last else 1
        sums = math.prod(shape[axis] for axis in (*own.contracted, *own.window))
        return groups, sums, math.prod(shape[axis] for axis in own.free) // groups

    def weight(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The weight of this shape from [G, K, C/G]."""
        order = self._weight_order
        ordered = matrix.transpose(0, 2, 1) if self._sums_last else matrix
        return ordered.reshape([shape[a] for a in order]).transpose(np.argsort(order))

    @property
    def _sums_last(self) -> bool:
        """True where a weight is brought into the order [G, C/G, K] first: that of a kernel."""
        return self.site.as_contraction.window is not None

    @property
    def _weight_order(self) -> tuple[int, ...]:
        own = self.site.weight_axes
        summed = (*own.contracted, *own.window)
        return (*own.free, *summed) if self._sums_last else (*summed, *own.free)

    def _patches(
        self, window: Window, x: jax.Array, zero: int | jax.Array, index: Index
    ) -> jax.Array:
        """What the window holds at each position; padding and dilation hold zeros."""
        own, kernel, result = self.site.as_contraction.axes
        assert self.site.weight is not None
        shape = self.graph.shape(self.site.weight)
        axes = self._position_axes
        places = jnp.unravel_index(jnp.asarray(index), [self._output[a] for a in axes])
        at = dict(zip(axes, places, strict=True))
        samples = at[result.free[0][0]]
        # Channels last, so that each tap gathers rows of them.
        x = x.transpose((*own.free, *own.window, *own.contracted))
        taps = []
        # One gather for each tap of the window, at the drawn positions alone.
        for offset in itertools.product(*(range(shape[a]) for a in kernel.window)):
            where, inside = [], jnp.ones(len(index), bool)
            for d, tap in enumerate(offset):
                # Where this tap reads the input, before it is dilated: the places between its
                # values hold zeros, as the padding does.
                step = at[result.window[d]] * window.strides[d]
                step = step + tap * window.dilation[d] - window.padding[d][0]
                source, between = jnp.divmod(step, window.input_dilation[d])
                inside &= (between == 0) & (source >= 0) & (source < x.shape[1 + d])
                where.append(jnp.clip(source, 0, x.shape[1 + d] - 1))
            # The zero point is taken away before what is outside becomes zero.
            rows = x[(samples, *where)].astype(jnp.float32) - jnp.float32(zero)
            taps.append(jnp.where(inside[:, None], rows, jnp.float32(0)))
        stacked = jnp.stack(taps, axis=-1)  # [R, input channels, taps]
        return stacked.reshape(len(index), self.site.as_contraction.feature_groups, -1)
