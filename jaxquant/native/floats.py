"""Depthwise convolution in float32, for the float model that calibration runs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library
from jaxquant.native.window import output_size


def float_depthwise(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: Sequence[int] = (1, 1),
) -> jax.Array:
    """Convolution of each channel with a window of its own, summed tap after tap.

    Args:
      x: float32 [N, H, W, C].
      kernel: float32 [KH, KW, 1, C].
      strides: of the window, rows and columns.
      padding: (before, after) of rows and columns, with zeros; negative to leave some away.
      dilation: of the kernel.

    Returns:
      float32 [N, OH, OW, C].

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes or dtypes are not as said above.
    """
    library.require()
    fits = x.ndim == kernel.ndim == 4 and kernel.shape[2:] == (1, x.shape[3])
    if not fits or {x.dtype.name, kernel.dtype.name} != {"float32"}:
        raise ValueError(
            f"expected float32 x [N, H, W, C] and kernel [KH, KW, 1, C], got "
            f"{x.dtype}{list(x.shape)} and {kernel.dtype}{list(kernel.shape)}"
        )
    rows, columns = output_size(x.shape[1:3], kernel.shape[:2], strides, padding, dilation)
    shape = jax.ShapeDtypeStruct((x.shape[0], rows, columns, x.shape[3]), jnp.float32)
    convolving = jax.ffi.ffi_call(library.FLOAT_DEPTHWISE, shape, vmap_method="sequential")
    # In the order in which the handler reads them.
    window = (*strides, *dilation, padding[0][0], padding[1][0])
    return convolving(x, kernel, window=np.asarray(window, np.int64))
