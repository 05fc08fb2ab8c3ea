"""One fused call, natively on CPU and as XLA lowers it elsewhere: the same arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant.graph import ir, jax_shim
from jaxquant.plan import layout
from jaxquant.run import int8, native
from jaxquant.run.fusion import NO_CLAMP, Chain
from jaxquant.run.quantized import QuantizedTensors


class FusedCall:
    """The call of one chain.

    Its operands are a dict: x, weight, multiplier; and, where there are such, packed, bias,
    inv_scale, residual, residual_scale.
    """

    def __init__(self, graph: ir.Graph, chain: Chain, zero_points: Mapping[ir.Var, int]):
        site = chain.site.site
        assert site.weight is not None
        self.chain = chain
        self._eqn = graph.equations[site.equation]
        self._weight_shape = graph.shape(site.weight)
        self._zero_point = zero_points[site.operands[0]]
        self._residual_zero_point = 0
        if chain.residual is not None and chain.residual_int8:
            self._residual_zero_point = zero_points[chain.residual]
        self._out_zero_point = 0 if chain.grid is None else zero_points[chain.grid]
        dtypes = [jnp.float32] * chain.float_out + [jnp.int8] * (chain.grid is not None)
        shape = graph.shape(chain.output)
        self._outputs = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]

    def __call__(self, operands: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """The float32 and the int8 output; None for one that nobody reads."""
        names = tuple(operands)

        def named(run: Any) -> Any:
            return lambda *arrays: run(dict(zip(names, arrays, strict=True)))

        results = jax_shim.choose_by_platform(
            named(self.native), named(self.portable), self._outputs, list(operands.values())
        )
        return (
            results[0] if self.chain.float_out else None,
            results[-1] if self.chain.grid is not None else None,
        )

    def native(self, operands: Mapping[str, jax.Array]) -> Sequence[jax.Array]:
        """One call of the native kernels."""
        out = residual = None
        if self.chain.grid is not None:
            lowest = -128 if self._out_zero_point else -127
            out = native.Requantize(operands["inv_scale"], self._out_zero_point, lowest)
        if self.chain.residual is not None:
            residual = native.Residual(
                operands["residual"], operands.get("residual_scale", 1.0), self._residual_zero_point
            )
        options: dict[str, Any] = {
            "zero_point": self._zero_point,
            "subtract_zero_point": False,  # the bias does
            "activation": self.chain.clamps[0],
            "residual": residual,
            "activation_after": self.chain.clamps[1],
            "out": out,
            "float_out": self.chain.float_out,
        }
        weight = operands.get("packed", operands["weight"])
        arrays = (operands["x"], weight, operands["multiplier"], operands.get("bias"))
        if self._eqn.name == "dot_general":
            columns = self._weight_shape[1] if "packed" in operands else None
            results = native.dot(*arrays, columns=columns, **options)
        else:
            params = self._eqn.params
            results = native.conv(
                *arrays,
                strides=tuple(params["window_strides"]),
                padding=tuple(params["padding"]),
                dilation=tuple(params["rhs_dilation"]),
                groups=params["feature_group_count"],
                kernel_shape=self._weight_shape if "packed" in operands else None,
                **options,
            )
        return results if isinstance(results, tuple) else (results,)

    def portable(self, operands: Mapping[str, jax.Array]) -> Sequence[jax.Array]:
        """The same in operations that XLA has everywhere."""
        arrays = [operands["x"], operands["weight"]]
        y = int8.accumulate(self._eqn, arrays, [self._zero_point]).astype(jnp.float32)
        y = y * operands["multiplier"]
        if "bias" in operands:
            y = y + operands["bias"]
        y = _clamp(y, self.chain.clamps[0])
        if self.chain.residual is not None:
            added = operands["residual"]
            if self.chain.residual_int8:
                scale = operands["residual_scale"]
                added = int8.dequantize(added, scale, self._residual_zero_point)
            y = _clamp(y + added, self.chain.clamps[1])
        results = [y] if self.chain.float_out else []
        if self.chain.grid is not None:
            results.append(int8.quantize(y, operands["inv_scale"], self._out_zero_point))
        return results

    def pack(self, weight: jax.Array) -> jax.Array:
        """The weight as the native kernels read it."""
        if self._eqn.name == "dot_general":
            return native.pack_dot(weight)
        params = self._eqn.params
        return native.pack_conv(
            weight, params["feature_group_count"], tuple(params["rhs_dilation"])
        )

    def operands(
        self,
        qparams: Mapping[str, Any],
        slot: layout.WeightSlot,
        quantized: QuantizedTensors,
    ) -> dict[str, jax.Array]:
        """What the call reads, of the arrays of the model and of the tensors so far."""
        site = self.chain.site.site
        epilogue = qparams["sites"][site.name]
        found = {
            "x": quantized.int8(site.operands[0]),
            "weight": layout.get(qparams["params"], slot.int8),
            "multiplier": epilogue["multiplier"],
        }
        if site.name in qparams.get("packed", {}):
            found["packed"] = qparams["packed"][site.name]
        if "bias" in epilogue:
            found["bias"] = epilogue["bias"]
        if self.chain.grid is not None:
            found["inv_scale"] = quantized.inv_scale(self.chain.grid)
        residual = self.chain.residual
        if residual is not None and self.chain.residual_int8:
            found["residual"] = quantized.int8(residual)
            found["residual_scale"] = quantized.scale(residual)
        elif residual is not None:
            found["residual"] = quantized.float32(residual)
        return {name: jnp.asarray(value) for name, value in found.items()}


def _clamp(y: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    if bounds == NO_CLAMP:
        return y
    return lax.clamp(jnp.float32(bounds[0]), y, jnp.float32(bounds[1]))
