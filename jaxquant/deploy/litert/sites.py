"""The accumulating int8 sites: int8 kernels where their result is quantized, else floats."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from jaxquant.deploy.litert import contraction, elementwise, reduction
from jaxquant.deploy.litert.chains import Chain
from jaxquant.deploy.litert.contraction import Result
from jaxquant.deploy.litert.emitter import Emitter
from jaxquant.deploy.litert.graph import Grid
from jaxquant.deploy.lower.convolution import ConvForm, conv_form
from jaxquant.deploy.lower.errors import NotCovered
from jaxquant.deploy.lower.values import Value
from jaxquant.deploy.lower.weights import Weight, make_weight, site_arrays
from jaxquant.deploy.network import Int8Node
from jaxquant.graph.contraction import Contraction

_SUMS = ("reduce_sum", "reduce_window_sum")


def emit_site(emitter: Emitter, site: Int8Node, chain: Chain | None) -> Value:
    """The result of a site: int8 at the end of its chain, or float at that of its epilogue."""
    if site.dynamic:
        return _dynamic(emitter, site)
    if site.weight or site.computed_weight is not None:
        return _weighted(emitter, site, chain)
    if site.node.op in _SUMS:
        return _sum(emitter, site, chain)
    return _product(emitter, site, chain)


def _dynamic(emitter: Emitter, site: Int8Node) -> Value:
    """A site whose operands get their scales in each call.

    LiteRT's kernels of floats and int8 weights do so too, by themselves ("hybrid"); products of two
    activations it has in float alone.
    """
    given, builder, shape = (
        site.node.contraction,
        emitter.builder,
        emitter.shape(site.node.outputs[0]),
    )
    assert given is not None, "an operation that is scaled in the call is a convolution or dot"
    operands = [emitter.full(emitter.value(var), var) for var in site.operands]
    if not (site.weight or site.computed_weight is not None):
        # One operand is a product of a tensor with itself.
        values = operands * 2 if len(operands) == 1 else operands
        arrays = emitter.model.sites[site.name]
        multiplier, bias = np.asarray(arrays["multiplier"]), arrays.get("bias")
        if multiplier.size != 1 or bias is not None:
            raise NotCovered("a product of activations with a multiplier for each channel")
        value = contraction.dot(builder, given, values, shape, Result())
        return _finished(emitter, site, value, float(multiplier.flat[0]), None)
    # The float operators with int8 weights scale their rows themselves, as `qapply` does.
    weight, form = _parts(emitter, site, given, 1.0)
    name, _ = _int8_parts(emitter, weight)
    read = [name, _float_bias(emitter, weight)]
    if form is not None:
        value = contraction.conv(builder, given, form, operands[0], read, shape, Result())
    else:
        side = 1 - site.weight_position
        value = contraction.dense(builder, given, side, operands[0], read, shape, Result())
    return _rearranged(emitter, site, value)


class _Parts(NamedTuple):
    """What a convolution or dense layer reads beside its input."""

    weight: Weight
    form: ConvForm | None


def _weighted(emitter: Emitter, site: Int8Node, chain: Chain | None) -> Value:
    """A convolution or dot with a weight."""
    given = site.node.contraction
    assert given is not None, "an operation with a weight is a convolution or dot"
    # Only clips and moves are fused with a weighted operation; a factor would change its scale.
    if chain is not None and chain.factor != 1:
        chain = None
    weight, form = _parts(
        emitter, site, given, emitter.model.scales.scale(emitter.model.entries(site)[0])
    )
    result = Result() if chain is None else emitter.end_of(chain)
    builder, shape = emitter.builder, emitter.shape(site.node.outputs[0])
    x = (
        emitter.operand(site.operands[0])
        if chain is None
        else emitter.int8_operand(site.operands[0])
    )
    read = _float_parts(emitter, site, weight) if chain is None else _int8_parts(emitter, weight)
    # With a chain the sums are rounded onto its grid; without one they are float.
    if form is not None:
        value = contraction.conv(builder, given, form, x, read, shape, result)
    else:
        side = 1 - site.weight_position
        value = contraction.dense(builder, given, side, x, read, shape, result)
    return _moved(emitter, site, value, chain, result)


def _parts(emitter: Emitter, site: Int8Node, given: Contraction, input_scale: float) -> _Parts:
    """The weight of a site in the layout of the file, with its epilogue folded in."""
    if given.choosing is not None or given.has_batch:
        raise NotCovered("an int8 dot whose weight has batch axes, or is chosen by row")
    int8, multiplier, bias = site_arrays(emitter.model, site)
    if given.window is not None:
        form = conv_form(given, int8.shape)
        stored, axis = contraction.kernel(form, int8)
        return _Parts(make_weight(stored, axis, multiplier, bias, input_scale), form)
    own = given.operands[site.weight_position]
    width = math.prod(int8.shape[axis] for axis in own.contracted)
    # Channels first: the runtime's dense layer reads a row for each of them.
    matrix = int8.transpose((*own.free, *own.contracted)).reshape(-1, width)
    return _Parts(make_weight(matrix, 0, multiplier, bias, input_scale), None)


def _int8_parts(emitter: Emitter, weight: Weight) -> list[str]:
    """The int8 weight and the int32 bias."""
    scale = np.broadcast_to(weight.scale, weight.int8.shape[weight.axis])
    name = emitter.builder.constant(weight.int8, "weight", Grid(scale, 0, weight.axis))
    steps, int32 = np.broadcast_to(weight.steps, scale.shape), weight.bias_steps()
    if int32 is None:
        return [name, contraction.no_bias(emitter.builder, len(scale), steps)]
    return [name, emitter.builder.constant(int32, "bias", Grid(steps))]


def _float_parts(emitter: Emitter, site: Int8Node, weight: Weight) -> list[str]:
    """The weight, stored as int8 and dequantized when the model is loaded, and a float bias."""
    emitter.in_float.append(site.name)
    name, _ = _int8_parts(emitter, weight)
    floats = emitter.builder.op("DEQUANTIZE", [name], weight.int8.shape)
    return [floats, _float_bias(emitter, weight)]


def _float_bias(emitter: Emitter, weight: Weight) -> str:
    if weight.bias is None:
        return contraction.no_bias(emitter.builder, weight.int8.shape[weight.axis], None)
    return emitter.builder.constant(weight.bias.astype(np.float32), "bias")


def _product(emitter: Emitter, site: Int8Node, chain: Chain | None) -> Value:
    """A dot of two activations."""
    given, builder = site.node.contraction, emitter.builder
    if given is None:
        raise NotCovered(f"the operation {site.node.op!r} in int8")
    ratio, bias = _epilogue(emitter, site)
    shape = emitter.shape(site.node.outputs[0])
    # The kernel multiplies scales alone: a multiplier that is something else stays in float.
    is_exact = bias is None and abs(ratio * (1.0 if chain is None else chain.factor) - 1) < 1e-6
    if chain is not None and is_exact:
        values = [emitter.int8_operand(var) for var in site.operands]
        values = values * 2 if len(values) == 1 else values
        result = Result(emitter.grid(chain.end))
        return _moved(
            emitter, site, contraction.dot(builder, given, values, shape, result), chain, result
        )
    values = [emitter.operand(var) for var in site.operands]
    values = values * 2 if len(values) == 1 else values
    return _finished(
        emitter, site, contraction.dot(builder, given, values, shape, Result()), ratio, bias
    )


def _sum(emitter: Emitter, site: Int8Node, chain: Chain | None) -> Value:
    """A mean or a sum, along axes or over windows."""
    builder, node = emitter.builder, site.node
    ratio, bias = _epilogue(emitter, site)
    shape = emitter.shape(node.outputs[0])
    if chain is not None and node.op == "reduce_sum" and bias is None:
        # Axes whose size varies have no count, and so no mean that is known here.
        axes = tuple(node.params["axes"])
        sizes = [emitter.shape(site.operands[0])[axis] for axis in axes]
        count = math.prod(size for size in sizes if isinstance(size, int))
        # A sum of so many times 1 / so many is a mean, which has an int8 kernel.
        is_mean = abs(ratio * chain.factor * count - 1) < 1e-6
        if is_mean and all(isinstance(size, int) for size in sizes):
            result = Result(emitter.grid(chain.end))
            x = emitter.int8_operand(site.operands[0])
            value = reduction.along(builder, "MEAN", x, axes, shape, "int8", result.grid)
            return _moved(emitter, site, value, chain, result)
    if chain is not None and node.op == "reduce_window_sum" and bias is None:
        return _average(emitter, site, chain)
    value = reduction.emit(builder, node, emitter.operand(site.operands[0]), shape)
    return _finished(emitter, site, value, ratio, bias)


def _average(emitter: Emitter, site: Int8Node, chain: Chain) -> Value:
    """A sum over windows as a depthwise convolution with a kernel of ones.

    LiteRT's average pool rounds ties away from zero, onto the grid of its operand, and leaves away
    what is padded; XNNPACK has none of int8.
    """
    builder, shape, result = (
        emitter.builder,
        emitter.shape(site.node.outputs[0]),
        emitter.end_of(chain),
    )
    window = reduction.window_of(builder, site.node, emitter.int8_operand(site.operands[0]))
    # The runtime's average rounds in another way; a convolution sums as `qapply` does.
    ones = np.ones((1, *window.sizes, int(window.value.physical[-1])), np.int8)
    worth = np.asarray(emitter.model.sites[site.name]["multiplier"], np.float64) * chain.factor
    multiplier = np.broadcast_to(worth.reshape(-1), ones.shape[-1:])
    (entry,) = emitter.model.entries(site)
    weight = make_weight(ones, 3, multiplier, None, emitter.model.scales.scale(entry))
    order = window.value.order
    physical = reduction.four([shape[axis] for axis in order])
    read = _int8_parts(emitter, weight)
    # One filter for each channel, and each of ones: a sum over the window.
    name = contraction.over_windows(builder, window, read, physical, result, filters=1)
    return _moved(emitter, site, reduction.narrowed(builder, name, shape, order), chain, result)


def _epilogue(emitter: Emitter, site: Int8Node) -> tuple[float, float | None]:
    """What a site without a weight multiplies the product of its operands by, and adds."""
    arrays = emitter.model.sites[site.name]

    # The multiplier is of the integers; the kernel multiplies what they are worth.
    worth = math.prod(emitter.model.scales.scale(entry) for entry in emitter.model.entries(site))
    ratio, bias = np.asarray(arrays["multiplier"]) / worth, arrays.get("bias")
    if ratio.size != 1 or (bias is not None and bias.size != 1):
        raise NotCovered("a product of activations with a multiplier for each channel")
    added = None if bias is None or not bias.any() else float(bias.flat[0])
    return float(ratio.flat[0]), added


def _finished(
    emitter: Emitter, site: Int8Node, value: Value, ratio: float, bias: float | None
) -> Value:
    """A float result with what it is multiplied by and what is added."""
    value = _rearranged(emitter, site, value)
    factor = value.factor * ratio

    # Off by rounding alone, a factor of one is no operation.
    value = dataclasses.replace(value, factor=1.0 if abs(factor - 1) < 1e-6 else factor)
    if bias is None:
        return value
    return elementwise.apply(
        emitter.builder, "ADD", [value, elementwise.scalar(emitter.builder, bias)]
    )


def _moved(
    emitter: Emitter, site: Int8Node, value: Value, chain: Chain | None, result: Result
) -> Value:
    """The rearrangements of the accumulator, and what is left of the chain."""
    value = _rearranged(emitter, site, value)
    return value if chain is None else emitter.behind(value, chain, result)


def _rearranged(emitter: Emitter, site: Int8Node, value: Value) -> Value:
    for node in site.movements:
        (value,) = emitter.apply(node, [value])
    return value
