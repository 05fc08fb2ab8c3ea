"""Input channels: the axes that a convolution or dot sums over, in its input and in its weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxquant.graph.sites import Site


def input_axes(site: Site) -> tuple[int, ...]:
    """The axes of a site's input that run along its input channels, ascending.

    The weight's other axes with the input (the batch axes of a dot) are not among them.
    """
    return tuple(sorted(site.input_axes.contracted))


def along_weight(site: Site, weight: Sequence[int], factors: np.ndarray) -> np.ndarray:
    """Lay one value per input channel along a weight.

    Args:
      site: a convolution or dot with a weight.
      weight: the weight's shape.
      factors: with the rank of the site's input; of size 1 but along `input_axes`.

    Returns:
      An array that broadcasts against the weight.  An output channel of a grouped convolution has
      the values of its own group.
    """
    shape = [1] * len(weight)
    # Grouped convolutions contract one part of the channels for each group of outputs.
    if (groups := site.as_contraction.feature_groups) > 1:
        (outputs,), (inputs,) = site.weight_axes.free, site.weight_axes.contracted
        rows = factors.reshape(groups, -1).repeat(weight[outputs] // groups, axis=0)  # [O, I]
        shape[outputs], shape[inputs] = rows.shape
        return (rows if outputs < inputs else rows.T).reshape(shape)
    # Dots may contract several axes, which the weight has in an order of its own.
    x_axes, w_axes = site.input_axes.contracted, site.weight_axes.contracted
    pairs = sorted(zip(w_axes, x_axes, strict=True))  # in the weight's order
    # `factors` lie by the input's axes, ascending; the weight has its own order.
    ascending = sorted(x_axes)
    value = factors.reshape([factors.shape[a] for a in ascending])
    value = value.transpose([ascending.index(x) for _, x in pairs])
    for axis, size in zip((w for w, _ in pairs), value.shape, strict=True):
        shape[axis] = size
    return value.reshape(shape)
