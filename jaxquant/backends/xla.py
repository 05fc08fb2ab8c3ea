"""The calls of an int8 program in operations that XLA has on every platform."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.backends import blocks, int8, ragged, residuals, tpu_floats
from jaxquant.backends.backend import (
    NO_CLAMP,
    Call,
    Clamp,
    FloatOperation,
    Links,
    Operands,
    Product,
)
from jaxquant.backends.epilogue import epilogue
from jaxquant.graph import contraction


class Xla:
    """Runs every call; XLA fuses what follows a sum with it as it can."""

    name = "xla"
    is_exported = True

    def covers(self, call: Call, is_packed: bool = True) -> bool:
        return True

    def joins(self, call: Call) -> bool:
        return True

    def pack(self, call: Call, weight: jax.Array) -> jax.Array:
        return weight

    def sums(self, call: Call, operands: Operands) -> jax.Array:
        """The int32 sums of a call."""
        zero_point = call.zero_points(operands).x
        arrays = _summed(call, operands)
        return int8.accumulate(call.contraction, arrays, [zero_point], holds=not _turns(call))

    def call(self, call: Call, operands: Operands) -> Sequence[jax.Array]:
        sums = self.sums(call, operands)
        if call.gives_sums:
            return [sums]
        scales, zero_points, turns = [], call.zero_points(operands), _turns(call)
        if call.contraction.choosing is not None:
            arrays = _summed(call, operands)
            scales.append(ragged.of_rows(call.contraction, operands["relative_scale"], *arrays))
        # One order for all backends: sum, multiplier and bias, clip, residual, clip, rounding.
        y = epilogue(call.movements, call.channels, sums.astype(jnp.float32), operands, scales)
        y = _clip(y, call.clamps[0])
        if call.residual is not None:
            added = operands["residual"]
            if call.residual.is_int8:
                scale = operands["residual_scale"]
                added = int8.dequantize(added, scale, zero_points.residual)
            elif call.contraction.window is not None:
                added = residuals.given_before(added)
            y = _clip(y + added, call.clamps[1])
        results = [y] if call.gives_float else []
        if call.out_zero_point is not None:
            to_grid = int8.rounded if call.in_floats else int8.quantize
            q = to_grid(y, operands["inv_scale"], zero_points.out)
            results.append(int8.turned(q, call.contraction) if turns else q)
        return results

    def sequence(
        self,
        calls: Sequence[Call],
        links: Sequence[Links],
        operands: Sequence[Operands],
        results: Sequence[tuple[int, int]],
    ) -> Sequence[jax.Array]:
        given: list[Sequence[jax.Array]] = []
        for call, linked, others in zip(calls, links, operands, strict=True):
            read = {name: given[at][k] for name, (at, k) in linked.items()}
            given.append(self.call(call, {**others, **read}))
        return [given[position][k] for position, k in results]

    def covers_product(self, product: Product, is_packed: bool = False) -> bool:
        return True

    def pack_product(self, product: Product, integers: jax.Array) -> jax.Array | None:
        return None

    def product(
        self, product: Product, *operands: jax.Array, packed: Sequence[jax.Array] = ()
    ) -> Sequence[jax.Array]:
        x, *arrays = operands
        if not product.is_whole:
            return [blocks.dot(alone, x, *matrix) for alone, matrix in product.apart(arrays)]
        dot = contraction.dot((((1,), (int(product.sums_last),)), ((), ())), (2, 2))
        return [int8.dot((x, integers), dot) for integers in arrays]

    def covers_operation(self, operation: FloatOperation) -> bool:
        return True

    def operation(self, operation: FloatOperation, *operands: jax.Array) -> jax.Array:
        return tpu_floats.run(operation, *operands)


def _summed(call: Call, operands: Operands) -> list[jax.Array]:
    """The operands of a call's contraction."""
    arrays = [operands["x"]]
    arrays.insert(call.weight_position, operands["weight"])
    return arrays if call.contraction.choosing is None else [*arrays, operands["sizes"]]


def _turns(call: Call) -> bool:
    """Whether the result is that of several heads, in int8 alone."""
    is_plain = not call.movements and call.weight_position == 1 and not call.gives_float
    return is_plain and not call.in_floats and int8.is_turned(call.contraction, call.shape)


def _clip(y: jax.Array, bounds: Clamp) -> jax.Array:
    if bounds == NO_CLAMP:
        return y
    return lax.clamp(jnp.float32(bounds[0]), y, jnp.float32(bounds[1]))
