"""int8 convolution and dot with a fused epilogue, by the native kernels.

Pure functions; each is one call from XLA, which computes what `jaxquant.native.fused` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jaxquant.native import library
from jaxquant.native.fields import Geometry
from jaxquant.native.fused import BIAS, ENDS, MULTIPLIER, PACKED, Call, Epilogue, X, make_call
from jaxquant.native.pack import pack_conv, pack_dot
from jaxquant.native.window import output_size


def conv(x: jax.Array, kernel: jax.Array, *rest: Any, **options: Any) -> Any:
    """Convolution of int8 tensors; see `jaxquant.native.fused` for the epilogue.

    Args:
      x, kernel, rest, options: as of `conv_call`.

    Returns:
      float32 or int8 [N, OH, OW, O], or both.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes, dtypes or padding are not as `conv_call` says.
    """
    return conv_call(x, kernel, *rest, **options).run()


def conv_call(
    x: Any,
    kernel: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[tuple[int, int]] = ((0, 0), (0, 0)),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    kernel_shape: Sequence[int] | None = None,
    **epilogue: Unpack[Epilogue],
) -> Call:
    """A convolution of int8 tensors; see `jaxquant.native.fused` for the epilogue.

    Args:
      x: int8 or uint8 [N, H, W, C]; where the window leaves it, it holds `zero_point`.
      kernel: int8 [KH, KW, C / groups, O]; or as `pack_conv` makes it, with `kernel_shape`.
      multiplier: float32 [O] or [].
      bias: float32 [O] or [], or None.
      strides: of the window, rows and columns.
      padding: (before, after) of rows and columns; not negative.
      dilation: of the kernel.
      groups: of the channels; C for a depthwise convolution.
      kernel_shape: of a packed kernel.
      epilogue: see `jaxquant.native.fused.Epilogue`.

    Returns:
      the call, not yet run: x and the residual may be anything with a shape and a dtype.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes, dtypes or padding are not as said above.
    """
    packed = kernel_shape is not None
    height, width, inputs, outputs = kernel_shape or kernel.shape
    if x.ndim != 4 or x.shape[3] != inputs * groups or outputs % groups:
        raise ValueError(
            f"a kernel {(height, width, inputs, outputs)} of {groups} groups does not fit "
            f"x {x.shape}"
        )
    # The kernels begin a sum with its first product.
    if not inputs:
        raise ValueError("a convolution of no input channels has nothing to sum")
    if any(pad < 0 for pads in padding for pad in pads):
        raise ValueError(f"padding {padding} is negative; slice x first")
    # Packed in the call: then the program has it as a constant, or computes it.
    if not packed:
        kernel = pack_conv(kernel, groups, dilation)
    # The kernels compute with plain numbers: everything is a shape from here on.
    taps = height, width
    rows, columns = output_size(x.shape[1:3], taps, strides, padding, dilation)
    geometry = Geometry(
        oh=rows,
        ow=columns,
        o=outputs,
        kh=height,
        kw=width,
        stride_h=strides[0],
        stride_w=strides[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        pad_h=padding[0][0],
        pad_w=padding[1][0],
        groups=groups,
    )
    out_shape, geometries = (rows, columns, outputs), ("geometry", geometry)
    return _with_epilogue(
        library.CONV, x, kernel, multiplier, bias, out_shape, geometries, **epilogue
    )


def dot(
    x: jax.Array,
    weight: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array | None = None,
    *,
    columns: int | None = None,
    **epilogue: Unpack[Epilogue],
) -> Any:
    """x [..., K] times a weight [K, N], of int8; see `jaxquant.native.fused` for the epilogue.

    Args:
      x: int8 or uint8 [..., K].
      weight: int8 [K, N]; or as `pack_dot` makes it, with `columns`.
      multiplier: float32 [N] or [].
      bias: float32 [N] or [], or None.
      columns: N of a packed weight.
      epilogue: see `jaxquant.native.fused.Epilogue`.

    Returns:
      float32 or int8 [..., N], or both.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes or dtypes are not as said above.
    """
    if not x.shape[-1]:
        raise ValueError("a dot over an axis of size 0 has nothing to sum")
    if columns is None:
        if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
            raise ValueError(f"a weight {weight.shape} does not fit x {x.shape}")
        columns = weight.shape[1]
        weight = pack_dot(weight)
    # Rows are rows, however many axes they lie along.
    lead = x.shape[:-1]
    if (residual := epilogue.get("residual")) is not None:
        # The residual has the result's rows, along whatever axes they lie.
        epilogue["residual"] = residual._replace(value=residual.value.reshape(-1, columns))
    rows = x.reshape(-1, x.shape[-1])
    of_rows = _with_epilogue(
        library.DOT, rows, weight, multiplier, bias, (columns,), ("columns", columns), **epilogue
    )
    return jax.tree.map(lambda y: y.reshape(*lead, columns), of_rows.run())


def dot_sums(x: jax.Array, packed: jax.Array, columns: int) -> jax.Array:
    """The int32 sums of x [M, K] times a weight [K, N]: the zero point of x counts as any number.

    Args:
      x: int8 [M, K].
      packed: the weight as `pack_dot` makes it.
      columns: N.

    Returns:
      int32 [M, N].

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
    """
    # A multiplier has to be there, though sums leave before it.
    unused = jnp.ones((columns,), jnp.float32)
    result: jax.Array = _with_epilogue(
        library.DOT, x, packed, unused, None, (columns,), ("columns", columns), sums_out=True
    ).run()
    return result


def dot_by_groups(
    x: jax.Array,
    packed: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array | None,
    ends: jax.Array,
    **epilogue: Unpack[Epilogue],
) -> Any:
    """Products side by side whose rows are in groups, each with a weight of its own; of int8.

    The groups of a product are one after the other among its M rows; the last one has all that are
    left.  P products of G groups each have W = P sets of weights, one for each, or W = 1 for all.

    Args:
      x: int8 or uint8 [P, M, K].
      packed: [W, G, bytes], each weight [K, N] as `pack_dot` makes it.
      multiplier: float32 [W, G, N].
      bias: float32 [W, G, N], or None.
      ends: int32 [P, G], where each group ends.
      epilogue: see `jaxquant.native.fused.Epilogue`; the residual is [P, M, N].

    Returns:
      float32 or int8 [P, M, N], or both.

    Raises:
      RuntimeError: the kernels do not run here (`available()` says why).
      ValueError: shapes or dtypes are not as said above.
    """
    sets, groups, columns = multiplier.shape
    expected = (*x.shape[:1], groups)
    if packed.ndim != 3 or packed.shape[:2] != (sets, groups) or ends.shape != expected:
        raise ValueError(
            f"weights of {packed.shape} and the ends of groups {ends.shape} do not fit x {x.shape} "
            f"and a multiplier {multiplier.shape}"
        )
    of_sets = (PACKED, MULTIPLIER) if bias is None else (PACKED, MULTIPLIER, BIAS)
    return make_call(
        library.GROUPS, x, packed, (multiplier, bias), (x.shape[1], columns),
        # Weights are mapped with the products where each product has its own.
        behind=(ends,), batched=(X, *(of_sets if sets == x.shape[0] != 1 else ()), ENDS),
        **epilogue,
    ).run()  # fmt: skip


def _with_epilogue(
    handler: str,
    x: jax.Array,
    packed: jax.Array,
    multiplier: jax.Array,
    bias: jax.Array | None,
    out_shape: tuple[int, ...],
    geometry: tuple[str, Any],
    **epilogue: Unpack[Epilogue],
) -> Call:
    channels = out_shape[-1]
    multiplier = _per_channel("multiplier", multiplier, channels)
    bias = None if bias is None else _per_channel("bias", bias, channels)
    return make_call(
        handler, x, packed, (multiplier, bias), out_shape, geometry=(geometry,), **epilogue
    )


def _per_channel(name: str, value: Any, channels: int) -> jax.Array:
    value = jnp.asarray(value, jnp.float32)
    if value.shape not in ((), (channels,)):
        raise ValueError(f"the {name} is {value.shape}; expected ({channels},) or ()")
    # One multiplier for all is spread here: the kernels read one for each channel.
    return jnp.broadcast_to(value, (channels,))
