"""A stored weight as the matrix of a product: [G, K, N], K in the order of its groups.

G are the groups of features of a convolution (one of anything else), N the output channels of each.
How a site takes its weight (transposed, a kernel with its window last) and how it is stored (groups
along its summed axes, flattened) differ; both are followed once, on the numbers of the elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxquant.graph import ir
from jaxquant.plan.groups import GroupLayout
from jaxquant.plan.layout import WeightView
from jaxquant.recover.product import SiteProduct
from jaxquant.weights.groups import in_layout, stored


class GroupedMatrix(NamedTuple):
    """Which elements of a stored weight the matrix of a site is made of.

    Attributes:
      layout: the groups of the weight.
      elements: int [G, K, N], the place of each in the weight, flattened.
      scales: int [G, groups, N], the place of the scale of each group among the scales, flattened.
      order: int [K], where the row of each of the product's own sums is.
    """

    layout: GroupLayout
    elements: np.ndarray
    scales: np.ndarray
    order: np.ndarray

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """[G, K, N] of an array of the stored shape."""
        return weight.reshape(-1)[self.elements]

    def integers(self, array: np.ndarray, weight_bits: int) -> np.ndarray:
        """int8 [G, K, N] of what is stored."""
        # Back from the order of the groups to that of the weight.
        there = in_layout(array, self.layout, weight_bits)
        return self.matrix(there.reshape(self.layout.permuted).transpose(self.layout.inverse))

    def stored(self, integers: np.ndarray, weight_bits: int) -> np.ndarray:
        """What is stored of int8 [G, K, N]."""
        layout = self.layout
        shape = [layout.permuted[axis] for axis in layout.inverse]
        flat = np.empty(integers.size, np.int8)
        # Each number has one place, so that all are filled.
        flat[self.elements] = integers
        weight = flat.reshape(shape).transpose(layout.order).reshape(layout.shape)
        return stored(weight, layout, weight_bits)

    def step(self, scale: np.ndarray) -> np.ndarray:
        """float32 [G, K, N], the step of each weight, of the stored scales."""
        groups = np.asarray(scale, np.float32).reshape(-1)[self.scales]
        return np.repeat(groups, self.layout.size, axis=1)[:, : self.elements.shape[1]]

    def vector(self, totals: np.ndarray) -> np.ndarray:
        """[..., K] in the order of the stored rows, of one in that of the product's sums."""
        return totals[..., np.argsort(self.order)]

    def covariance(self, products: np.ndarray) -> np.ndarray:
        """[..., K, K] likewise."""
        back = np.argsort(self.order)
        return products[..., back, :][..., :, back]


def grouped_matrix(
    product: SiteProduct, view: WeightView, layout: GroupLayout
) -> GroupedMatrix | None:
    """How the matrix of a site is stored; None where one stored element is in several places of it.

    Args:
      product: the site.
      view: how it takes what is stored.
      layout: the groups of that.
    """
    graph = product.graph
    count = int(np.prod(view.shape))
    # Numbers in place of weights: where each comes to lie tells the order.
    elements = _taken(graph, np.arange(count).reshape(view.shape), view, product)
    if elements.size != count:
        return None

    # Where each element is along the flattened summed axes, and which scale it has.
    length = layout.shape[layout.axis]
    along = [length if axis == layout.axis else 1 for axis in range(len(layout.shape))]
    rows = np.broadcast_to(np.arange(length).reshape(along), layout.shape)
    scale_shape = list(layout.shape)
    scale_shape[layout.axis] = layout.groups
    scales = np.arange(int(np.prod(scale_shape))).reshape(scale_shape)
    scales = np.take(scales, np.arange(length) // layout.size, axis=layout.axis)
    flat_rows, flat_scales = (
        each.reshape(layout.permuted).transpose(layout.inverse).reshape(-1)
        for each in (rows, scales)
    )
    # By the first column: along K all columns lie alike.
    order = flat_rows[elements[0, :, 0]]
    elements = elements[:, np.argsort(order)]
    # One scale a group: that of the group's first row.
    return GroupedMatrix(layout, elements, flat_scales[elements[:, :: layout.size]], order)


def _taken(
    graph: ir.Graph, array: np.ndarray, view: WeightView, product: SiteProduct
) -> np.ndarray:
    """[G, K, N] of a stored array, moved as the site's weight is."""
    value: np.ndarray = array
    for movement in view.movements:
        if movement.name == "transpose":
            value = value.transpose(movement.params["permutation"])
        else:
            value = _spread(
                value, movement.params["shape"], movement.params["broadcast_dimensions"]
            )
    assert product.site.weight is not None
    return product.matrix(np.broadcast_to(value, graph.shape(product.site.weight)))


def _spread(value: np.ndarray, shape: Sequence[int], places: Sequence[int]) -> np.ndarray:
    """What `broadcast_in_dim` gives."""
    sizes = [1] * len(shape)
    for place, size in zip(places, value.shape, strict=True):
        sizes[place] = size
    return np.broadcast_to(value.reshape(sizes), shape)
