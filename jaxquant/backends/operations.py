"""Operations beside the sums of int8 that have a kernel too, and where that runs.

Each takes the form that JAX has everywhere, `portable`, and is that form where no kernel runs: on
other platforms, on several devices, in an export, or where the kernels cannot be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import native
from jaxquant.graph.contraction import Window
from jaxquant.jax_shim import choices
from jaxquant.native import Weighing

__all__ = [
    "Weighing",
    "are_loaded",
    "counter",
    "depthwise",
    "difference_types",
    "differences",
    "kl_search",
    "load",
    "quantize",
    "quantize_rows",
]

Search: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def are_loaded() -> bool:
    """Whether this process has loaded the kernels, or knows that it cannot."""
    return native.is_known()


def load() -> None:
    """Load the kernels, and compile them where this machine has not yet, which takes long."""
    native.available()


def counter(portable: choices.Form, least_exponent: int) -> choices.Form:
    """How a tensor's values are counted; see `jaxquant.native.histogram`.

    In a third of the time of XLA's scatter on two cores (experiments/benchmarks/histogram.py).
    """
    if not native.runs_here():
        return portable

    def natively(x: jax.Array) -> Sequence[jax.Array]:
        return native.histogram(x, least_exponent)

    def count(x: jax.Array) -> Sequence[jax.Array]:
        return choices.choose_on_one_cpu(natively, portable, native.histogram_types(), [x])

    return count


def kl_search(weighing: Weighing) -> Search | None:
    """The search `(counts, limit, levels) -> thresholds` without XLA; None where JAX's runs."""
    if not native.runs_here():
        return None
    return functools.partial(native.kl_thresholds, weighing=weighing)


def differences(
    portable: choices.Form, clamp: tuple[float, float], operands: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """How far tensors are apart; see `jaxquant.native.differences`.

    Args:
      portable: a function of the operands that clips by itself.
      clamp: the activation, by its bounds.
      operands: float32 [..., C]: y, ŷ, and perhaps the gain.
    """
    if not native.runs_here():
        return portable(*operands)

    def natively(y: jax.Array, y_hat: jax.Array, *gain: jax.Array) -> Sequence[jax.Array]:
        return native.differences(y, y_hat, clamp, *gain)

    outputs = difference_types(operands[0].shape[-1])
    return choices.choose_on_one_cpu(natively, portable, outputs, operands)


def difference_types(channels: int) -> list[jax.ShapeDtypeStruct]:
    """Shape and dtype of what `differences` gives."""
    return native.difference_types(channels)


def quantize(
    portable: choices.Form, x: jax.Array, inv_scale: jax.Array, zero_point: jax.Array
) -> Sequence[jax.Array]:
    """Rows in int8 on one grid, and the marks of those that it cannot hold.

    See `jaxquant.native.quantize`.

    Args:
      portable: a function of the operands that gives the same.
      x: float32 [N, K].
      inv_scale, zero_point: float32 [] or [C], C numbers apart in a row, and int32 [].
    """
    operands = [x, inv_scale, zero_point]
    # Kernels take no empty tensor: there is no row to take a scale of.
    if not native.runs_here() or 0 in x.shape:
        return portable(*operands)
    outputs = [
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct(x.shape[:1], jnp.float32),
    ]
    return choices.choose_on_one_cpu(native.quantize, portable, outputs, operands)


def quantize_rows(
    portable: choices.Form, x: jax.Array, *, is_asymmetric: bool, smallest_scale: float
) -> Sequence[jax.Array]:
    """Rows in int8 on grids of their own; see `jaxquant.native.quantize_rows`.

    Args:
      portable: a function of x that gives the same.
      x: float32 [..., K].
      is_asymmetric, smallest_scale: of the grids.
    """
    if not native.runs_here() or 0 in x.shape:
        return portable(x)

    def natively(x: jax.Array) -> Sequence[jax.Array]:
        return native.quantize_rows(x, is_asymmetric=is_asymmetric, smallest_scale=smallest_scale)

    # A row is int8, with a scale and a zero point of its own.
    outputs = [
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32),
        jax.ShapeDtypeStruct(x.shape[:-1], jnp.int32),
    ]
    return choices.choose_on_one_cpu(natively, portable, outputs, [x])


def depthwise(
    portable: choices.Form, window: Window, shape: Sequence[int], operands: Sequence[jax.Array]
) -> jax.Array:
    """A convolution of each channel with a window of its own; see `jaxquant.native`.

    Args:
      portable: a function of the operands.
      window: how the kernel slides.
      shape: of the result.
      operands: float32 x [N, H, W, C] and kernel [KH, KW, 1, C].
    """
    if not native.runs_here():
        return portable(*operands)[0]

    def natively(x: jax.Array, kernel: jax.Array) -> Sequence[jax.Array]:
        made = native.float_depthwise(
            x, kernel, strides=window.strides, padding=window.padding, dilation=window.dilation
        )
        return [made]

    outputs = [jax.ShapeDtypeStruct(tuple(shape), jnp.float32)]
    result: jax.Array = choices.choose_on_one_cpu(natively, portable, outputs, operands)[0]
    return result
