"""Input channels: the axes that a convolution or dot sums over, in its input and in its weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxquant.graph import ir
from jaxquant.graph.sites import Site


def input_axes(site: Site, eqn: ir.Equation) -> tuple[int, ...]:
    """The axes of a site's input that run along its input channels, ascending.

    The weight's other axes with the input (the batch axes of a dot) are not among them.
    """
    if eqn.name == "conv_general_dilated":
        return (eqn.params["dimension_numbers"].lhs_spec[1],)
    return tuple(sorted(eqn.params["dimension_numbers"][0][1 - site.weight_position]))


def along_weight(
    site: Site, eqn: ir.Equation, weight: Sequence[int], factors: np.ndarray
) -> np.ndarray:
    """Lay one value per input channel along a weight.

    Args:
      site: a convolution or dot with a weight.
      eqn: its equation.
      weight: the weight's shape.
      factors: with the rank of the site's input; of size 1 but along `input_axes`.

    Returns:
      An array that broadcasts against the weight.  An output channel of a grouped convolution has
      the values of its own group.
    """
    if eqn.name == "conv_general_dilated":
        spec, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        outputs = weight[spec.rhs_spec[0]] if groups > 1 else 1
        rows = factors.reshape(groups, -1).repeat(outputs // groups or 1, axis=0)  # [O or 1, I]
        rows = rows if spec.rhs_spec[0] < spec.rhs_spec[1] else rows.T
        shape = [1] * len(weight)
        shape[spec.rhs_spec[0]], shape[spec.rhs_spec[1]] = outputs, factors.size // groups
        return rows.reshape(shape)
    contract = eqn.params["dimension_numbers"][0]
    x_axes, w_axes = contract[1 - site.weight_position], contract[site.weight_position]
    pairs = sorted(zip(w_axes, x_axes, strict=True))  # in the weight's order
    ascending = sorted(x_axes)
    value = factors.reshape([factors.shape[a] for a in ascending])
    value = value.transpose([ascending.index(x) for _, x in pairs])
    shape = [1] * len(weight)
    for axis, size in zip((w for w, _ in pairs), value.shape, strict=True):
        shape[axis] = size
    return value.reshape(shape)
