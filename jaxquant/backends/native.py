"""The calls of an int8 program by the native kernels of this processor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxquant import native
from jaxquant.backends.backend import Call, Links, Operands
from jaxquant.backends.conv import ChannelsLast, undilated

# Outputs of a channel from which on packing the weight in a call, for the native kernels, takes no
# longer than those save: XLA's dots of 1 to 8 rows took a half to a third of the time of packing
# and the native ones (two cores, AVX512-VNNI), and longer from 32 rows on.
_ROWS_WORTH_PACKING = 32


class Native:
    """Runs convolutions of one and two axes, and dots of x's last axes with a weight's first ones.

    Args:
      packs_all: False to leave to XLA what takes the kernels longer because they have to pack its
        weight first.
    """

    name = "native"
    is_exported = False  # an export may run where the kernels are not

    def __init__(self, packs_all: bool = False):
        self._packs_all = packs_all

    def covers(self, call: Call, is_packed: bool = True) -> bool:
        is_worth_packing = self._packs_all or call.rows >= _ROWS_WORTH_PACKING
        return (is_packed or is_worth_packing) and has(call)

    def joins(self, call: Call) -> bool:
        """True for a convolution whose input and result the kernels read and write as they are."""
        if call.contraction.window is None or not has(call):
            return False
        layout = ChannelsLast(call.contraction)
        return layout.is_plain and layout.window.is_undilated

    def pack(self, call: Call, weight: jax.Array) -> jax.Array:
        if call.contraction.window is None:
            return native.pack_dot(_matrix(call, weight))
        layout = ChannelsLast(call.contraction)
        window = layout.window
        return native.pack_conv(layout.kernel(weight), window.feature_groups, window.dilation)

    def call(self, call: Call, operands: Operands) -> Sequence[jax.Array]:
        if call.contraction.window is not None:
            layout = ChannelsLast(call.contraction)
            return [layout.back(y) for y in _results(_convolution(call, operands).run())]
        x, axes, packed = operands["x"], call.contraction.operands, operands.get("packed")
        lead = x.shape[: len(axes[0].free)]
        channels = [call.weight_shape[a] for a in axes[1].free]
        y = native.dot(
            x.reshape(*lead, math.prod(x.shape[len(lead) :])),
            _matrix(call, operands["weight"]) if packed is None else packed,
            operands["multiplier"],
            operands.get("bias"),
            columns=None if packed is None else math.prod(channels),
            **_options(call, operands),
        )
        return [each.reshape(*lead, *channels) for each in _results(y)]

    def sequence(
        self,
        calls: Sequence[Call],
        links: Sequence[Links],
        operands: Sequence[Operands],
        results: Sequence[tuple[int, int]],
    ) -> Sequence[jax.Array]:
        made = []
        for call, linked, others in zip(calls, links, operands, strict=True):
            read = {name: _link(calls, *source) for name, source in linked.items()}
            made.append(_convolution(call, {**others, **read}))
        return native.sequence(made, results)


def has(call: Call) -> bool:
    """True where there are kernels for a call."""
    if call.movements or call.weight_position != 1:
        return False
    if call.channels.axes not in (call.contraction.result.free[1], ()):
        return False
    x, weight, _ = call.contraction.axes
    if call.contraction.window is not None:
        return len(weight.window) in (1, 2)
    # A product of matrices, but for shapes: the kernels of a `DenseGeneral`, of any rank.
    summed = len(weight.contracted)
    are_last = x.contracted == tuple(range(x.rank - summed, x.rank))
    are_first = weight.contracted == tuple(range(summed))
    has_both = summed > 0 and bool(weight.free) and not weight.batch
    return call.contraction.is_dot and has_both and are_first and are_last


def _matrix(call: Call, weight: jax.Array) -> jax.Array:
    """The weight of a dot as [K, N]."""
    summed = len(call.contraction.operands[1].contracted)
    return weight.reshape(math.prod(weight.shape[:summed]), math.prod(weight.shape[summed:]))


def _results(given: Any) -> Sequence[jax.Array]:
    return given if isinstance(given, tuple) else (given,)


def _convolution(call: Call, operands: Any) -> native.Call:
    """The call of a convolution, whose results are channels last."""
    x, contraction = undilated(operands["x"], call.contraction, call.zero_points(operands).x)
    layout = ChannelsLast(contraction)
    packed, options = operands.get("packed"), _options(call, operands)
    if (residual := options["residual"]) is not None:
        options["residual"] = residual._replace(value=layout.like_result(residual.value))
    return native.conv_call(
        layout.x(x),
        layout.kernel(operands["weight"]) if packed is None else packed,
        operands["multiplier"],
        operands.get("bias"),
        strides=layout.window.strides,
        padding=layout.window.padding,
        dilation=layout.window.dilation,
        groups=layout.window.feature_groups,
        kernel_shape=None if packed is None else layout.kernel_shape(call.weight_shape),
        **options,
    )


def _options(call: Call, operands: Any) -> dict[str, Any]:
    out = residual = None
    zero_points = call.zero_points(operands)
    if call.out_zero_point is not None:
        out = native.Requantize(operands["inv_scale"], zero_points.out)
    if call.residual is not None:
        scale = operands.get("residual_scale", 1.0)
        residual = native.Residual(operands["residual"], scale, zero_points.residual)
    return {
        "zero_point": zero_points.x,
        "subtract_zero_point": False,  # the bias does
        "activation": call.clamps[0],
        "residual": residual,
        "activation_after": call.clamps[1],
        "out": out,
        "float_out": call.gives_float,
    }


def _link(calls: Sequence[Call], position: int, result: int) -> native.Link:
    output = calls[position].outputs[result]
    return native.Link(position, result, output.shape, output.dtype)
