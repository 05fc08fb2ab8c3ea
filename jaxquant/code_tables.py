"""Four-bit weights that are no integers: codes, each of which stands for a value in a table.

"nf4": the quantiles of a normal distribution, scaled so that the largest is 1 (T. Dettmers et al.,
QLoRA, 2023, appendix E); its code is the place in the table, and a group's scale its largest |w|.

"mxfp4": the floats E2M1 with a sign, two bits of exponent and one of mantissa, of which 32
neighbours share a power of two (Open Compute Project, Microscaling Formats v1.0, 5.3.3).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

INT = "int"  # integers, of which a code is one
NF4, MXFP4 = "nf4", "mxfp4"
BLOCK = 32  # weights that share a scale in "mxfp4"
BIAS = 127  # of the exponents in E8M0: a byte e is 2 ** (e - 127)

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# The value of each of the 16 codes.
VALUES: Mapping[str, np.ndarray] = {
    NF4: np.array(_QUANTILES, np.float32),
    MXFP4: np.array((*_HALF, *(-x for x in _HALF)), np.float32),
}


def look_up(codes: jax.Array, weight_dtype: str) -> jax.Array:
    """The values of codes 0 to 15: float32."""
    return jnp.asarray(VALUES[weight_dtype])[codes.astype(jnp.int32)]


def as_floats(scale: jax.Array) -> jax.Array:
    """Scales as floats; E8M0, which is uint8, as powers of two from 2 ** -126 on: float32."""
    if scale.dtype != jnp.uint8:
        return scale
    # An exponent of 0 would be a subnormal float, which processors flush to zero.
    exponents = jnp.maximum(scale, jnp.uint8(1)).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(exponents << 23, jnp.float32)
