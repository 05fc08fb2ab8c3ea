"""The columns of an output, float model against int8 model: a small one may be lost in the sum.

A column is an index of the last axis: a class, a coordinate, a channel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.recover.shift import unit_of

_FAR = 5.0  # dB


class Columns(NamedTuple):
    """What is measured of y and ŷ in each column, float64 [C], where y is finite.

    Attributes:
      signal, noise: Σ y² and Σ (y - ŷ)²; infinite noise where the int8 model alone is not finite.
      low, high: the least and the largest y.
      int8_low, int8_high: likewise of ŷ.
      zeros: how often y is exactly zero.
    """

    signal: Any
    noise: Any
    low: Any
    high: Any
    int8_low: Any
    int8_high: Any
    zeros: Any

    @staticmethod
    def of(array: np.ndarray) -> Columns:
        """Read what `measure_columns` gives; in float64, which holds the squares of any float32."""
        # Squares of a unit would overflow in float32.
        signal, noise, *others, unit = np.asarray(array, np.float64)
        low, high, int8_low, int8_high, zeros = others
        square = unit**2
        return Columns(signal * square, noise * square, low, high, int8_low, int8_high, zeros)

    @property
    def sqnr_db(self) -> np.ndarray:
        """[C]; NaN for a column that is all zero, which has no noise to compare."""
        # 0 / 0 is NaN, which is what a column of zeros is to have.
        signal, noise = (np.asarray(x, np.float64) for x in (self.signal, self.noise))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(signal > 0, 10 * np.log10(signal / noise), np.nan)

    @property
    def lost(self) -> np.ndarray:
        """bool [C], True where y varies and never is zero, and ŷ is one value, far from it.

        Values behind a ReLU, of which a few may well all be rounded to zero, are no loss.
        """
        varies = np.asarray(self.low) < np.asarray(self.high)
        is_constant = np.asarray(self.int8_low) == np.asarray(self.int8_high)
        is_far = np.nan_to_num(self.sqnr_db, nan=np.inf, posinf=np.inf, neginf=-np.inf) < _FAR
        return varies & is_constant & is_far & (np.asarray(self.zeros) == 0)


def measure_columns(reference: jax.Array, quantized: jax.Array) -> jax.Array:
    """What `Columns.of` takes, float32 [8, C], of two arrays of one shape.

    C is 0 below rank 2: there are none.  Signal and noise are in units, which come last.
    """
    if reference.ndim < 2 or 0 in reference.shape:
        return jnp.zeros((len(Columns._fields) + 1, 0), jnp.float32)
    y, y_hat = (x.astype(jnp.float32) for x in (reference, quantized))
    rows = tuple(range(y.ndim - 1))
    # Where the float model overflows there is nothing to compare.
    counted = jnp.isfinite(y)
    unit = unit_of(y, y_hat, axis=rows)
    scaled, scaled_hat = (x * (1 / unit) for x in (y, y_hat))
    noise = jnp.sum(jnp.where(counted, scaled - scaled_hat, 0) ** 2, axis=rows)
    # The extremes tell of columns that came to be constant: a lost channel has noise like others.
    extremes = [
        function(jnp.where(counted, x, bound), axis=rows)
        for x in (y, y_hat)
        for function, bound in ((jnp.min, jnp.inf), (jnp.max, -jnp.inf))
    ]

    # One array of rows for all: a fetch each would take longer than they.
    return jnp.stack(
        [
            jnp.sum(jnp.where(counted, scaled, 0) ** 2, axis=rows),
            jnp.where(jnp.isnan(noise), jnp.inf, noise),
            *extremes,
            jnp.sum(y == 0, axis=rows).astype(jnp.float32),
            unit,
        ]
    )
