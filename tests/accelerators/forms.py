"""The int8 forms by name: functions of int8 arrays that give int8, and what they take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import int8
from jaxquant.graph import trace
from jaxquant.run import pooling
from tests.contractions import int8_conv, int8_dot

BATCHES = (1, 8, 32)
# By name: x, kernel and result, as JAX writes a layout.
LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "NHC": ("NHC", "HIO", "NHC"),
    "NCH": ("NCH", "OIH", "NCH"),
    "NDHWC": ("NDHWC", "DHWIO", "NDHWC"),
}


class Convolution(NamedTuple):
    """What a convolution has beside its layout: channels, and how its window slides."""

    inputs: int = 32
    outputs: int = 64
    window: int = 3
    stride: int = 1
    dilation: int = 1
    input_dilation: int = 1
    groups: int = 1
    zero_point: int = -128


CONVOLUTIONS = {
    "plain": Convolution(),
    "strided": Convolution(stride=2),
    "dilated": Convolution(dilation=2),
    "transposed": Convolution(input_dilation=2),
    "1x1": Convolution(window=1),
    "stem": Convolution(inputs=3, window=7, stride=2, zero_point=3),
    "odd channels": Convolution(inputs=5, outputs=7),
    "padded with zeros": Convolution(zero_point=0),
    "groups": Convolution(inputs=64, groups=2),
    "odd groups": Convolution(inputs=12, outputs=6, groups=3),
    "many groups": Convolution(inputs=256, outputs=256, groups=32),
    "depthwise": Convolution(inputs=32, outputs=32, groups=32),
    "depthwise strided": Convolution(inputs=64, outputs=64, groups=64, stride=2),
    "depthwise of many": Convolution(inputs=256, outputs=256, groups=256),
    "depthwise of many, strided": Convolution(inputs=256, outputs=256, groups=256, stride=2),
    "more terms than are exact": Convolution(inputs=256),
}

# x [batch, ...], the weight, and which axes of them are summed over and shared.
DOTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any]] = {
    "dense": ((128,), (128, 256), (((1,), (0,)), ((), ()))),
    "tokens": ((64, 128), (128, 256), (((2,), (0,)), ((), ()))),
    "heads": ((64, 128), (128, 4, 32), (((2,), (0,)), ((), ()))),
    "out of heads": ((64, 4, 32), (4, 32, 128), (((2, 3), (0, 1)), ((), ()))),
}


class Form(NamedTuple):
    """A function, and what it takes."""

    function: Callable[..., jax.Array]
    args: tuple[jax.ShapeDtypeStruct, ...]


def names() -> list[str]:
    """All forms, one more for each batch."""
    kinds = [f"{layout} {name}" for layout in LAYOUTS for name in CONVOLUTIONS]
    kinds += [*(f"dot {name}" for name in DOTS), "attention", "max pool 3x3 by 2", "max pool 2x2"]
    return [f"{kind}, batch {batch}" for kind in kinds for batch in BATCHES]


def form(name: str) -> Form:
    """The form of that name."""
    kind, _, batch = name.rpartition(", batch ")
    family, _, rest = kind.partition(" ")
    if family == "dot":
        return _dot(rest, int(batch))
    if family == "attention":
        return _attention(int(batch))
    if family == "max":
        return _pool(rest, int(batch))
    return _convolution(LAYOUTS[family], CONVOLUTIONS[rest], int(batch))


def _requantized(sums: jax.Array, multiplier: jax.Array) -> jax.Array:
    """As behind a site: int8 of the sums on another scale."""
    y = jnp.maximum(sums.astype(jnp.float32) * multiplier, jnp.float32(0))
    return int8.quantize(y, jnp.float32(0.05), -128)


def _convolution(layout: tuple[str, str, str], given: Convolution, batch: int) -> Form:
    rank = len(layout[0]) - 2
    sizes = {"N": batch, "C": given.inputs, "I": given.inputs // given.groups, "O": given.outputs}
    positions = {1: 64, 2: 28, 3: 8}[rank]
    shapes = [
        tuple(sizes.get(letter, size) for letter in letters)
        for letters, size in ((layout[0], positions), (layout[1], given.window))
    ]
    pad = given.window // 2 * given.dilation
    params = {
        "window_strides": (given.stride,) * rank,
        "padding": ((pad, pad),) * rank,
        "lhs_dilation": (given.input_dilation,) * rank,
        "rhs_dilation": (given.dilation,) * rank,
        "dimension_numbers": lax.conv_dimension_numbers(*shapes, layout),
        "feature_group_count": given.groups,
    }
    along = [given.outputs if letter == "C" else 1 for letter in layout[2]]

    def function(x: jax.Array, kernel: jax.Array, multiplier: jax.Array) -> jax.Array:
        sums = int8_conv(x, kernel, params, given.zero_point)
        return _requantized(sums, multiplier.reshape(along))

    return Form(function, (*_int8(*shapes), _float(given.outputs)))


def _dot(name: str, batch: int) -> Form:
    x, w, numbers = DOTS[name]
    free = [size for axis, size in enumerate(w) if axis not in numbers[0][1]]

    def function(x: jax.Array, w: jax.Array, multiplier: jax.Array) -> jax.Array:
        return _requantized(int8_dot((x, w), numbers), multiplier)

    return Form(function, (*_int8((batch, *x), w), _float(*free)))


def _attention(batch: int) -> Form:
    """Queries times keys, and what comes of them times values: [batch, tokens, heads, features]."""

    def function(q: jax.Array, k: jax.Array, v: jax.Array, multiplier: jax.Array) -> jax.Array:
        scores = int8_dot((q, k), (((3,), (3,)), ((0, 2), (0, 2))))
        weights = _requantized(scores, multiplier)
        return _requantized(int8_dot((weights, v), (((3,), (1,)), ((0, 1), (0, 2)))), multiplier)

    return Form(function, (*_int8(*[(batch, 64, 4, 32)] * 3), _float()))


def _pool(name: str, batch: int) -> Form:
    size, stride = {"pool 3x3 by 2": (3, 2), "pool 2x2": (2, 2)}[name]
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    pads = ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0))
    floats = functools.partial(
        lax.reduce_window,
        init_value=-jnp.inf,
        computation=lax.max,
        window_dimensions=window,
        window_strides=strides,
        padding=pads if size == 3 else "VALID",
    )
    shape = (batch, 56, 56, 64)
    graph = trace.trace(lambda _, x: floats(x), {}, (jnp.zeros(shape),))
    (eqn,) = (e for e in graph.equations if e.name == "reduce_window_max")
    return Form(lambda x: pooling.max_pool(x, eqn), tuple(_int8(shape)))


def _int8(*shapes: tuple[int, ...]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, jnp.int8) for shape in shapes]


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
