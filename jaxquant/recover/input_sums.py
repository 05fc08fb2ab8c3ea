"""What a weight's readers see: the sums by which the errors of their outputs are told.

An error E of a weight puts xᵀ E beside the outputs.  Where a parameter is added to them, the mean
of that is taken away there, and what varies about the mean is left: E is to be small for the
covariance of x, not for its second moments.  Means differ less from text to text than the rest does
and outlier channels of a LayerNorm are little else, so that such a rounding holds for other data.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxquant.recover.covariance import APART, KEPT

FEWEST = 32  # positions to round a weight, or to take a mean, on
_NOISE = 1e-5  # of second moments summed in float32, which a difference of them keeps


class InputSums(NamedTuple):
    """What one site reads, in the order of the rows of the weight.

    Attributes:
      products: float64 [2, G, K, K], Σ x xᵀ of its two parts.
      totals: float64 [2, G, K], Σ x.
      weights: [2], of the positions in these sums.
      counts: [2], of positions.
      has_added: whether a parameter is added to its outputs, alone with them.
    """

    products: np.ndarray
    totals: np.ndarray
    weights: np.ndarray
    counts: np.ndarray
    has_added: bool

    @property
    def takes_mean(self) -> bool:
        """Whether a parameter takes the mean away, as far as there are enough positions to tell."""
        return self.has_added and bool(self.counts[KEPT] >= FEWEST and self.counts[APART])

    def varying(self, *parts: int) -> np.ndarray:
        """[G, K, K], the sums over some parts, about their mean where that is taken away."""
        own = list(parts)
        products, totals = self.products[own].sum(axis=0), self.totals[own].sum(axis=0)
        if not self.takes_mean:
            return products
        moments = np.einsum("gkk->gk", products)
        noise = _NOISE * moments[..., None] * np.eye(moments.shape[-1])
        return products - _outer(totals, totals) / self.weights[own].sum() + noise

    def held_out(self) -> np.ndarray:
        """[G, K, K], of the part that is held out, about the mean of the other one."""
        products, totals = self.products[APART], self.totals[APART]
        if not self.takes_mean:
            return products
        mean = self.totals[KEPT] / self.weights[KEPT]
        both = _outer(totals, mean)
        return products - both - both.swapaxes(-1, -2) + self.weights[APART] * _outer(mean, mean)

    @property
    def mean(self) -> np.ndarray:
        """[G, K], of all positions."""
        return self.totals.sum(axis=0) / self.weights.sum()


def _outer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., :, None] * b[..., None, :]
