"""Convolution of int8 arrays with int32 accumulation: the exact form of each platform.

`FORMS` is the table; which form runs is chosen when a program is lowered, so that an exported one
holds several.  What each compiler makes of an int8 convolution decides (for CPU
`experiments/benchmarks/kinds.py`):

               cpu                      cuda, rocm                  tpu
  layout       channels last, by        channels last               as it is
               transposes that are held
  one axis     gets a second one        gets a second one           as it is
  three axes   a sum over the first     as they are                 as they are
  depthwise    a sum of shifted         a sum of shifted            a sum of shifted products;
               products                 products                    strided as it is
  1x1          a dot                    a dot                       as it is
  groups       as they are              as they are, of fours       one, up to 128 channels
  channels     few are padded           each group padded to fours  as they are
  sums         int32                    float32 at once, exactly    int32

What pads the input, and lies between its elements where it is dilated, is the zero point; where
that is not zero, it is padded beforehand on each platform.  On a TPU that costs less than to pad
with zeros and to correct the sums at the border.

On CPU XLA would undo transposes and padding, since it folds them into the convolution; and of int8
padded and dilated with zeros that gives wrong sums there (jax 0.10; jax 0.12 fails to compile it).
A barrier keeps it from that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import direct, taps
from jaxquant.backends.channels_last import ChannelsLast, fully_padded, padded, undilated, window_of
from jaxquant.backends.zero_points import ZeroPoint, is_zero
from jaxquant.graph.contraction import Contraction, Window
from jaxquant.jax_shim import choices, layouts

# A register of a TPU holds so many rows of so many values.
_TPU_SUBLANES, _TPU_LANES = 8, 128

# (x, kernel, the convolution, the zero point of x) -> int32 sums
Form: TypeAlias = Callable[[jax.Array, jax.Array, Contraction, ZeroPoint], jax.Array]


def conv(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint = 0
) -> jax.Array:
    """Convolution of int8 arrays to int32, in the form of the platform for which it is compiled.

    What pads the input, and lies between its elements where it is dilated, is the zero point.
    """
    # Platforms share forms; only the one that is picked is traced.
    forms = list(dict.fromkeys([*FORMS.values(), *EXPORTED.values(), as_it_is]))
    is_operand = isinstance(zero_point, jax.Array)
    # An array has to be an operand: a form may not close over what is traced outside of it.
    operands = [x, kernel, zero_point] if is_operand else [x, kernel]

    # Decided when the program is lowered: an export has the form that its platform needs.
    def pick(place: choices.Place) -> int:
        table = EXPORTED if place.is_export else FORMS
        return forms.index(table.get(place.platform, as_it_is))

    def of_arrays(form: Form) -> choices.Form:
        def run(x: jax.Array, kernel: jax.Array, *given: jax.Array) -> list[jax.Array]:
            return [form(x, kernel, contraction, given[0] if given else zero_point)]

        return run

    # All forms give the same, so that the plainest says what.
    output = jax.eval_shape(lambda x, k: _convolution(x, k, contraction), x, kernel)
    (result,) = choices.choose(pick, [of_arrays(form) for form in forms], [output], operands)
    return jnp.asarray(result)


def on_cpu(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> jax.Array:
    """What XLA runs fast on CPU: two spatial axes, channels last, more than a few of them.

    Every other form is tens to hundreds of times slower there, slower than in float32.
    """
    x, contraction = undilated(x, contraction, zero_point)
    layout = ChannelsLast(contraction)
    x, kernel = layout.x(x), layout.kernel(kernel)
    return layout.back(_on_cpu(x, kernel, layout.window, zero_point))


def on_gpu(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> jax.Array:
    """What XLA makes one cuDNN convolution of, one product in Triton, or one loop."""
    x, contraction = undilated(x, contraction, zero_point, is_held=False)
    layout = ChannelsLast(contraction, is_held=False)
    x, kernel, window = layout.x(x), layout.kernel(kernel), layout.window
    # cuDNN has int8 for channels in fours; other small windows are sums of products.
    if taps.runs_by_taps(x, kernel, window):
        sums = taps.by_taps(padded(x, window.padding, zero_point), kernel, window)
    else:
        x, window = _padded_beforehand(x, window, zero_point)
        of_fours = direct.by_way_of_float32
        form = taps.pointwise if taps.is_pointwise(kernel, window) else of_fours
        sums = form(x, kernel, window)
    return layout.back(sums)


def on_tpu(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> jax.Array:
    """`on_any_tpu`, whose sums stay in the order of axes in which a TPU convolves.

    That has the channels last and the samples before them.  Of few channels XLA rather computes
    the epilogue in another one, and does not fuse it with the convolution then: the sums go to
    memory as int32, and are copied twice.
    """
    sums = on_any_tpu(x, kernel, contraction, zero_point)
    result = contraction.result
    (samples, channels), places = result.free, result.window
    is_few = sums.shape[channels[0]] < _TPU_LANES
    batch = sums.shape[samples[0]]
    # So few channels would leave lanes empty; samples fill sublanes where they come in eights.
    if is_few and isinstance(batch, int) and batch % _TPU_SUBLANES == 0:
        return layouts.held_in(sums, (*places, *samples, *channels))
    return sums


def on_any_tpu(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> jax.Array:
    """One convolution of XLA's, which finds a layout by itself, and one group where that is faster.

    Groups whose channels together are no more than the matrix unit has rows cost no more as one
    group, with zeros between them, than one of them does.  Of more channels a depthwise convolution
    is a sum over its taps, but where it has a stride: by taps XLA pads in memory first then, and
    its compiler aborts on int8 that is padded and then sliced with a stride of 2 in batches of 32
    and more (libtpu 0.0.42.1).
    """
    layout, groups = ChannelsLast(contraction, is_held=False), contraction.feature_groups
    window, of_groups = layout.window, layout.kernel(kernel)
    # Groups that fit into one tile together cost no more than one of them.
    if groups > 1 and groups * of_groups.shape[-2] <= _TPU_LANES:
        kernel, contraction = _as_one_group(kernel, contraction)
        return as_it_is(x, kernel, contraction, zero_point)
    if window.is_undilated and {*window.strides} == {1}:
        own = layout.x(x)
        if taps.runs_by_taps(own, of_groups, window):
            own = padded(own, window.padding, zero_point)
            return layout.back(taps.by_taps(own, of_groups, window))
    return as_it_is(x, kernel, contraction, zero_point)


def as_it_is(
    x: jax.Array, kernel: jax.Array, contraction: Contraction, zero_point: ZeroPoint
) -> jax.Array:
    """One convolution in its own layout, with int32 sums."""
    if not is_zero(zero_point):
        x, contraction = fully_padded(x, contraction, zero_point)
    return _convolution(x, kernel, contraction)


FORMS: Mapping[str, Form] = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu, "tpu": on_tpu}
EXPORTED: Mapping[str, Form] = {**FORMS, "tpu": on_any_tpu}


def _on_cpu(x: jax.Array, kernel: jax.Array, window: Window, zero_point: ZeroPoint) -> jax.Array:
    """Channels last; any number of spatial axes."""
    if taps.runs_by_taps(x, kernel, window):
        return taps.by_taps(padded(x, window.padding, zero_point), kernel, window)
    if x.ndim > 4:
        return _by_first_axis(x, kernel, window, zero_point)
    # Taps and first axes have padded already, where XLA fuses it.
    x, window = _padded_beforehand(x, window, zero_point)
    form = taps.pointwise if taps.is_pointwise(kernel, window) else direct.with_enough_channels
    return form(x, kernel, window)


def _padded_beforehand(
    x: jax.Array, window: Window, zero_point: ZeroPoint
) -> tuple[jax.Array, Window]:
    """The input padded where its zero point is not zero, and the window that is left."""
    if is_zero(zero_point):
        return x, window
    nothing = ((0, 0),) * len(window.padding)
    return padded(x, window.padding, zero_point), dataclasses.replace(window, padding=nothing)


def _by_first_axis(
    x: jax.Array, kernel: jax.Array, window: Window, zero_point: ZeroPoint
) -> jax.Array:
    """The sum over the first axis of the window of convolutions with one spatial axis less."""
    first = (window.padding[0], *((0, 0),) * (x.ndim - 3))
    x, rest = padded(x, first, zero_point), window.without_first()
    terms = []

    # Each element of the window along the first axis sees a stack of images of one axis less.
    for at in range(kernel.shape[0]):
        rows = taps.taps_of(x, 1, at, kernel.shape[0], window.strides[0], window.dilation[0])
        flat = rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])
        term = _on_cpu(flat, kernel[at], rest, zero_point)
        terms.append(term.reshape(*rows.shape[:2], *term.shape[1:]))
    return sum(terms[1:], start=terms[0])


def _as_one_group(kernel: jax.Array, contraction: Contraction) -> tuple[jax.Array, Contraction]:
    """The kernel of all channels, with zeros between the groups, and the convolution with it."""
    own, groups = contraction.operands[1], contraction.feature_groups
    (inputs,), (outputs,) = own.contracted, own.free
    copies = [groups if axis == inputs else 1 for axis in range(kernel.ndim)]
    repeated = jnp.tile(kernel, copies)
    # The group that each input and each output channel is in.
    of_input, of_output = (
        lax.broadcasted_iota(jnp.int32, repeated.shape, axis) // (repeated.shape[axis] // groups)
        for axis in (inputs, outputs)
    )
    # Zeros between the groups: their products add nothing to the sums.
    whole = jnp.where(of_input == of_output, repeated, jnp.zeros((), kernel.dtype))
    window = dataclasses.replace(window_of(contraction), feature_groups=1)
    return whole, dataclasses.replace(contraction, window=window)


def _convolution(x: jax.Array, kernel: jax.Array, contraction: Contraction) -> jax.Array:
    """The int32 sums of a convolution that is padded and dilated with zeros."""
    # The axes by their roles, which XLA's dimension numbers spell in another order.
    own, of_kernel, result = contraction.axes
    samples, channels = result.free
    window = window_of(contraction)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(
            (*own.free, *own.contracted, *own.window),
            (*of_kernel.free, *of_kernel.contracted, *of_kernel.window),
            (*samples, *channels, *result.window),
        ),
        feature_group_count=window.feature_groups,
        # Sums of int8 products would overflow in the operands' own dtype.
        preferred_element_type=jnp.int32,
    )
