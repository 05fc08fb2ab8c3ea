"""The calls of an int8 program by the native kernels of this processor."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxquant import native
from jaxquant.backends import float_operations, ragged
from jaxquant.backends.backend import Call, FloatOperation, Links, Operands, Product
from jaxquant.backends.channels_last import ChannelsLast, undilated
from jaxquant.backends.matrices import Matrices, matrices_of
from jaxquant.code_tables import VALUES
from jaxquant.graph import ir
from jaxquant.jax_shim import jaxprs

# Outputs of a channel from which on packing the weight in a call, for the native kernels, takes no
# longer than those save: XLA's dots of 1 to 8 rows took a half to a third of the time of packing
# and the native ones (two cores, AVX512-VNNI), and longer from 32 rows on.
_ROWS_WORTH_PACKING = 32
# Rows of a product with a stored matrix, of floats and of int8, up to which the kernels are faster
# than XLA: with more rows memory is not what it takes long for (two cores, AVX512-VNNI).
_FEW_ROWS, FEW_INT8_ROWS = 16, 8
# What codes of four bits stand for that are no integers.
_CODES = {name: tuple(map(float, values)) for name, values in VALUES.items()}


class Native:
    """Runs convolutions of one and two axes, and dots with a weight, ragged or not.

    It runs products with a stored matrix where they have few rows, which read the integers as they
    lie, many float rows and a matrix [K, N], or many int8 rows, which pack them.  From among the
    operations of floats it has attention, GELU and layer normalization.

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
        is_alone = call.movements or call.gives_sums
        return layout.is_plain and layout.window.is_undilated and not is_alone

    def pack(self, call: Call, weight: jax.Array) -> jax.Array:
        if call.contraction.window is None:
            own = call.contraction.operands[call.weight_position]
            matrices = matrices_of(weight, own)
            if _is_one(call):
                return native.pack_dot(matrices[0, 0])
            return jax.vmap(jax.vmap(native.pack_dot))(matrices)
        # In the layout in which the call will read, whatever the model's own is.
        layout = ChannelsLast(call.contraction)
        window = layout.window
        return native.pack_conv(layout.kernel(weight), window.feature_groups, window.dilation)

    def call(self, call: Call, operands: Operands) -> Sequence[jax.Array]:
        if call.contraction.window is not None:
            layout = ChannelsLast(call.contraction)
            given = _results(_convolution(call, operands).run())
            return [_moved(call.movements, layout.back(y)) for y in given]
        matrices = Matrices(
            call.contraction, call.weight_position, operands["x"].shape, call.weight_shape
        )
        options = _options(call, operands)
        # The kernel adds before the result is moved, so that the residual is moved back.
        if (residual := options["residual"]) is not None:
            before = _before(call.movements, matrices.result, residual.value)
            options["residual"] = residual._replace(value=matrices.of_result(before))
        packed = operands["packed"] if "packed" in operands else self.pack(call, operands["weight"])
        product = _one_product if _is_one(call) else _products
        given = product(call, operands, matrices, packed, options)
        return [_moved(call.movements, matrices.back(y)) for y in _results(given)]

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

    def covers_product(self, product: Product, is_packed: bool = False) -> bool:
        if not isinstance(product.rows, int) or product.length == 0:
            return False
        if product.is_whole:
            few, many = product.rows <= FEW_INT8_ROWS, product.rows >= _ROWS_WORTH_PACKING
            # Packed in the call, only many rows are worth it; packed beforehand, all are.
            return few or ((many or is_packed) and native.int8_is_faster().available)
        has_dtype = np.dtype(product.dtype).name in ("float32", "bfloat16")
        by_steps = product.groups == 1 or product.group_size % native.GROUP_STEP == 0
        has_form = product.rows <= _FEW_ROWS or not product.sums_last
        # The kernels go along a column in steps, of which each is to have one scale.
        return has_form and has_dtype and by_steps

    def pack_product(self, product: Product, integers: jax.Array) -> jax.Array | None:
        return _packed(product, integers) if product.is_whole else None

    def product(
        self, product: Product, *operands: jax.Array, packed: Sequence[jax.Array] = ()
    ) -> Sequence[jax.Array]:
        x, *arrays = operands
        if product.is_whole and product.rows > FEW_INT8_ROWS:
            packed = packed or [_packed(product, integers) for integers in arrays]
            pairs = zip(packed, product.columns, strict=True)
            return [native.dot_sums(x, each, columns) for each, columns in pairs]
        # Few rows wait for memory: they read the matrix as it lies, once.
        matrices = [matrix for _, matrix in product.apart(arrays)]
        return native.dot_stored(
            x,
            [(integers, scale[0] if scale else None) for integers, *scale in matrices],
            sums_last=product.sums_last,
            group_size=product.group_size or product.length,
            codes=_CODES.get(product.weight_dtype, ()),
        )

    def covers_operation(self, operation: FloatOperation) -> bool:
        return float_operations.has(operation)

    def operation(self, operation: FloatOperation, *operands: jax.Array) -> jax.Array:
        return float_operations.run(operation, *operands)


def _packed(product: Product, integers: jax.Array) -> jax.Array:
    return native.pack_dot(integers.T if product.sums_last else integers)


def has(call: Call) -> bool:
    """True where there are kernels for a call."""
    contraction = call.contraction
    x, weight = (contraction.operands[k] for k in (1 - call.weight_position, call.weight_position))
    if any(eqn.name not in _MOVES for eqn in call.movements):
        return False
    if contraction.window is not None:
        return len(weight.window) in (1, 2)
    kept = [axis for axis in weight.kept if axis not in weight.chosen]
    channels = math.prod(call.weight_shape[axis] for axis in kept)
    if not weight.contracted or not weight.free or math.prod(call.channels.sizes) != channels:
        return False  # a vector, an outer product, a weight that batch axes share
    # Else neither have all products the same weights nor each its own.
    return contraction.choosing is None or not x.batch or x.free[0] == contraction.choosing


# What rearranges sums without copies or reversals, so that it can be undone.
_MOVES = frozenset({"transpose", "reshape", "squeeze", "broadcast_in_dim", "copy", "stop_gradient"})


def _is_one(call: Call) -> bool:
    """True where a dot is one product of two matrices."""
    return not call.contraction.has_batch and call.contraction.choosing is None


def _one_product(
    call: Call, operands: Operands, matrices: Matrices, packed: jax.Array, options: dict[str, Any]
) -> Any:
    """The results [P, M, N] of a call that is one product."""
    if options["residual"] is not None:
        residual = options["residual"]
        # The leading axes are those of a batch of products, and this is one of them.
        options["residual"] = residual._replace(value=residual.value[0])
    multiplier, bias = (
        None if name not in operands else matrices.of_channels(operands[name]).reshape(-1)
        for name in ("multiplier", "bias")
    )
    assert multiplier is not None, "every call has a multiplier"
    x = matrices.x(operands["x"])[0]
    return native.dot(x, packed, multiplier, bias, columns=matrices.columns, **options)


def _products(
    call: Call, operands: Operands, matrices: Matrices, packed: jax.Array, options: dict[str, Any]
) -> Any:
    """The results [P, M, N] of a call that is several products, with weights of their own."""
    multiplier = matrices.of_channels(operands["multiplier"], has_groups=False)
    bias = None
    if "bias" in operands:
        bias = matrices.of_channels(operands["bias"], has_groups=False)
    x, ends = matrices.x(operands["x"]), matrices.ends(operands.get("sizes"))
    if call.contraction.choosing is not None:
        multiplier = matrices.of_channels(operands["relative_scale"]) * multiplier
        x = ragged.with_zeros(x, ends, options["zero_point"])
        options["subtract_zero_point"] = True  # it has another part in each group's sums
    return native.dot_by_groups(x, packed, multiplier, bias, ends, **options)


def _moved(movements: Sequence[ir.Equation], value: jax.Array) -> jax.Array:
    """A result behind the equations that rearrange it."""
    for eqn in movements:
        (value,) = jaxprs.bind(eqn.primitive, [value], dict(eqn.params))
    return value


def _before(movements: Sequence[ir.Equation], shape: Sequence[int], value: jax.Array) -> jax.Array:
    """What the equations that rearrange a result make `value` of.

    Args:
      movements: the equations.
      shape: of the result before them.
      value: an array like the result behind them.
    """
    shapes = [tuple(shape)]
    for eqn in movements:
        struct = jax.ShapeDtypeStruct(shapes[-1], value.dtype)
        shapes.append(jax.eval_shape(functools.partial(_moved, [eqn]), struct).shape)
    # Backwards: each movement is undone on what those behind it were undone to.
    for eqn, before in zip(reversed(movements), reversed(shapes[:-1]), strict=True):
        if eqn.name == "transpose":
            value = value.transpose(np.argsort(eqn.params["permutation"]))
        else:
            value = value.reshape(before)
    return value


def _results(given: Any) -> Sequence[jax.Array]:
    return given if isinstance(given, tuple) else (given,)


def _convolution(call: Call, operands: Any) -> native.Call:
    """The call of a convolution, whose results are channels last."""
    x, contraction = undilated(operands["x"], call.contraction, call.zero_points(operands).x)
    layout = ChannelsLast(contraction)
    packed, options = operands.get("packed"), _options(call, operands)
    x = layout.x(x)
    if (residual := options["residual"]) is not None:
        # A residual stands behind the movements; the call adds it before them.
        before = _before(call.movements, _result_shape(call, layout, x.shape), residual.value)
        options["residual"] = residual._replace(value=layout.like_result(before))
    return native.conv_call(
        x,
        layout.kernel(operands["weight"]) if packed is None else packed,
        # Sums leave as they are; the call takes a multiplier all the same.
        jnp.float32(1) if call.gives_sums else operands["multiplier"],
        operands.get("bias"),
        strides=layout.window.strides,
        padding=layout.window.padding,
        dilation=layout.window.dilation,
        groups=layout.window.feature_groups,
        kernel_shape=None if packed is None else layout.kernel_shape(call.weight_shape),
        sums_out=call.gives_sums,
        **options,
    )


def _result_shape(call: Call, layout: ChannelsLast, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a convolution's result, of that of its input with channels last."""
    window = layout.window
    *taps, _, channels = layout.kernel_shape(call.weight_shape)
    # From the input at hand, whose batch and sizes may be others than those of the trace.
    sizes = native.output_size(shape[1:3], taps, window.strides, window.padding, window.dilation)
    like = jax.ShapeDtypeStruct((shape[0], *sizes, channels), np.int8)
    return jax.eval_shape(layout.back, like).shape


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
