"""Dots of few int8 rows with weights that are not packed: sums by a kernel, the rest by XLA.

A step of a decoder in a static int8 model has one row.  To pack a weight for it takes longer than
XLA's product, and that takes twice as long as the memory takes to give the weight.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxquant import native
from jaxquant.backends.backend import Call, FloatOperation, Operands, Product
from jaxquant.backends.matrices import Matrices
from jaxquant.backends.native import FEW_INT8_ROWS
from jaxquant.backends.xla import Xla
from jaxquant.jax_shim import choices


class FewRows(Xla):
    """Runs dots whose weight is one matrix as it lies, [K, N] or [N, K]."""

    is_exported = False  # an export may run where the kernels are not

    def covers(self, call: Call, is_packed: bool = True) -> bool:
        return not is_packed and 0 < call.rows <= FEW_INT8_ROWS and _is_matrix(call)

    def joins(self, call: Call) -> bool:
        return False

    def covers_product(self, product: Product, is_packed: bool = False) -> bool:
        return False

    def covers_operation(self, operation: FloatOperation) -> bool:
        return False

    def sums(self, call: Call, operands: Operands) -> jax.Array:
        x, names = operands["x"], tuple(operands)
        matrices = Matrices(call.contraction, call.weight_position, x.shape, call.weight_shape)
        sums_last = _sums_last(call)

        def by_kernel(*arrays: jax.Array) -> list[jax.Array]:
            given, shape = (
                dict(zip(names, arrays, strict=True)),
                (matrices.summed, matrices.columns),
            )
            # As it lies: a transpose would move the whole matrix.
            weight = given["weight"].reshape(shape[::-1] if sums_last else shape)
            rows = matrices.x(given["x"])[0]
            (sums,) = native.dot_stored(
                rows, [(weight, None)], sums_last=sums_last, group_size=matrices.summed
            )
            return [matrices.back(sums[None])]

        # XLA leaves a weight that is spread over devices where it is.
        def by_xla(*arrays: jax.Array) -> list[jax.Array]:
            return [super(FewRows, self).sums(call, dict(zip(names, arrays, strict=True)))]

        outputs = [jax.ShapeDtypeStruct(matrices.result, jnp.int32)]
        given = list(operands.values())
        (sums,) = choices.choose_by_devices(by_kernel, by_xla, outputs, given)
        return jnp.asarray(sums)


def _is_matrix(call: Call) -> bool:
    """True where what is summed over are the first axes of the weight, or the last, in order."""
    # The kernel reads the weight in place: to turn the largest operand costs more than it saves.
    contraction = call.contraction
    if contraction.window is not None or contraction.choosing is not None or contraction.has_batch:
        return False
    own = contraction.operands[call.weight_position]
    if not own.free or not own.contracted or 0 in call.weight_shape:
        return False
    rank = len(call.weight_shape)
    first = (*own.contracted, *own.free) == tuple(range(rank))
    return first or _sums_last(call)


def _sums_last(call: Call) -> bool:
    own = call.contraction.operands[call.weight_position]
    return (*own.free, *own.contracted) == tuple(range(len(call.weight_shape)))
