"""A call of the native kernels: an int8 sum with its fused epilogue.

With q an int8 tensor, zp its zero point and s its scale, a value is (q - zp) * s.  A call computes

    y = sum((q_x - zp_x) * q_w) * multiplier + bias        int32 sums; float32 from here
    y = clip(y, *activation)
    y = y + (q_r - zp_r) * s_r                             or + r, of a float32 residual
    y = clip(y, *activation_after)
    q = clip(round_half_even(y * inv_scale) + zp, -128, 127)

and return y, q, or both; or the sums alone.  Each line rounds as XLA's lowering on CPU does
(multiply and add are contracted to one rounding), so results are the same bits.

An int8 tensor may also be stored as uint8, which holds q + 128: what it is read from is then not
converted first.  Zero points are those of the stored type: of uint8, 128 is the symmetric one.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant.native import library
from jaxquant.native.call import Static, call
from jaxquant.native.fields import Clamps, ZeroPoint, ZeroPoints

Clamp = tuple[float, float]
NO_CLAMP: Clamp = (-math.inf, math.inf)
# The places of a call's operands, in the order in which its handler takes them (`src/fused.h`).
X, PACKED, MULTIPLIER, BIAS, INV_SCALE, RESIDUAL_SCALE, ZERO_POINTS, RESIDUAL = range(8)
# Of `dot_by_groups`, behind the zero points; the residual is behind it.
ENDS = 7


class Residual(NamedTuple):
    """A tensor of the output's shape that is added: int8 or uint8 with a scale, or float32."""

    value: jax.Array
    scale: Any = 1.0
    zero_point: ZeroPoint = 0


class Requantize(NamedTuple):
    """How the output becomes int8: inverse scale, zero point, int8 or uint8."""

    inv_scale: Any
    zero_point: ZeroPoint = 0
    dtype: Any = jnp.int8


class Epilogue(TypedDict, total=False):
    """What a call does behind its sums, as keyword arguments; all may be left out.

    Attributes:
      zero_point: of x; an int, or an int32 [] array, as every zero point.
      subtract_zero_point: False where the bias takes away zero_point * sum(q_w), as that of
        jaxquant's `qparams` does: the sums keep it then.
      activation: clip behind the bias.
      residual: added behind the activation.
      activation_after: clip behind the residual.
      out: how to make the output int8; without it it is float32.
      float_out: give the float32 output too, before the int8 one.
      sums_out: give the int32 sums and nothing else.
    """

    zero_point: ZeroPoint
    subtract_zero_point: bool
    activation: Clamp
    residual: Residual | None
    activation_after: Clamp
    out: Requantize | None
    float_out: bool
    sums_out: bool


class Call(NamedTuple):
    """One operation that is yet to run; `run` does it alone, `jaxquant.native.sequence` several.

    Attributes:
      static: what it is compiled for.
      operands: x, the packed weight, multiplier, bias (empty for none), inverse scale of the
        output, scale of the residual, zero points, and perhaps the residual: at the places `X` to
        `RESIDUAL`.
    """

    static: Static
    operands: list[Any]

    def run(self) -> Any:
        """The result, or a tuple of both."""
        results = call(self.static, self.operands)
        return results[0] if len(results) == 1 else results


def make_call(
    handler: str,
    x: jax.Array,
    packed: jax.Array,
    channels: tuple[jax.Array, jax.Array | None],
    out_shape: tuple[int, ...],
    *,
    geometry: tuple[tuple[str, Any], ...] = (),
    behind: tuple[jax.Array, ...] = (),
    batched: tuple[int, ...] = (X,),
    **epilogue: Unpack[Epilogue],
) -> Call:
    """A call of any handler.

    Args:
      handler: what is called.
      x, packed: its first operands.
      channels: the multiplier and the bias, in the shapes that the handler takes.
      out_shape: of a sample's result.
      geometry: attributes of the handler beside the bounds of the clips.
      behind: operands between the zero points and the residual.
      batched: the places of the operands that have the batch, as of `Static`, but the residual's.
      epilogue: see `Epilogue`.
    """
    library.require()
    _check_dtype("x", x, ("int8", "uint8"))
    _check_dtype("the packed weight", packed, ("int8",))

    # `get`, since an epilogue says only what differs from the plainest one.
    multiplier, bias = channels
    out, residual = epilogue.get("out"), epilogue.get("residual")
    out_dtypes = []
    if epilogue.get("sums_out"):
        out_dtypes.append("int32")
    # Something has to be given: without an int8 result the float one is.
    elif epilogue.get("float_out") or out is None:
        out_dtypes.append("float32")
    if out is not None:
        out_dtypes.append(jnp.dtype(out.dtype).name)

    # In the order of `X` to `RESIDUAL`; what is not there has a stand-in, so that places stay.
    operands = [x, packed, multiplier, jnp.zeros((0,), jnp.float32) if bias is None else bias]
    operands.append(jnp.asarray(1.0 if out is None else out.inv_scale, jnp.float32))
    operands.append(jnp.asarray(1.0 if residual is None else residual.scale, jnp.float32))
    residual_zero_point: ZeroPoint = 0
    if residual is not None:
        _check_dtype("the residual", residual.value, ("int8", "uint8", "float32"))
        # XLA would read beyond it: shapes are checked here, where messages can tell.
        if residual.value.shape != (x.shape[0], *out_shape):
            raise ValueError(
                f"the residual is {residual.value.shape}, the output {(x.shape[0], *out_shape)}"
            )
        residual_zero_point = _centred(residual.zero_point, residual.value.dtype)

    # The kernels count from int8's zero points whatever the stored type is.
    of_input = _centred(epilogue.get("zero_point", 0), x.dtype)
    zero_points = ZeroPoints(
        input=of_input,
        subtracted=of_input if epilogue.get("subtract_zero_point", True) else 0,
        residual=residual_zero_point,
        output=0 if out is None else _centred(out.zero_point, out.dtype),
    )
    operands += [zero_points.operand(), *behind]
    if residual is not None:
        batched = (*batched, len(operands))
        operands.append(residual.value)

    # Bounds as floats: infinity is no clip.
    low, high = epilogue.get("activation", NO_CLAMP)
    low_after, high_after = epilogue.get("activation_after", NO_CLAMP)
    bounds = Clamps(float(low), float(high), float(low_after), float(high_after))
    static = Static(
        handler,
        tuple((out_shape, dtype) for dtype in out_dtypes),
        batched,
        (*geometry, ("clamps", bounds)),
    )
    return Call(static, operands)


def _check_dtype(name: str, value: jax.Array, allowed: tuple[str, ...]) -> None:
    if np.dtype(value.dtype).name not in allowed:
        raise ValueError(f"{name} is {value.dtype}; expected {' or '.join(allowed)}")


def _centred(zero_point: ZeroPoint, dtype: Any) -> ZeroPoint:
    """The zero point of the int8 value, of one that is given for the stored type."""
    # uint8 holds the same integers plus 128.
    return zero_point - 128 if np.dtype(dtype) == np.uint8 else zero_point
