"""One call: a site with a stored weight and what follows it in the same pass.

Natively on CPU, and as XLA lowers it elsewhere: the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxquant import native
from jaxquant.backends import int8
from jaxquant.backends.conv import ChannelsLast, undilated
from jaxquant.graph import ir
from jaxquant.jax_shim import choices
from jaxquant.native import Call, Residual
from jaxquant.plan import layout
from jaxquant.run.epilogue import epilogue
from jaxquant.run.fusion import NO_CLAMP, Chain, is_native
from jaxquant.run.lowerings import Evaluation

# Outputs of a channel from which on packing the weight in a call, for the native kernels, takes no
# longer than those save: XLA's dots of 1 to 8 rows took a half to a third of the time of packing
# and the native ones (two cores, AVX512-VNNI), and longer from 32 rows on.
_ROWS_WORTH_PACKING = 32


class FusedCall:
    """The call of one chain, and its lowering.

    Its operands are a dict: x, weight, multiplier; and, where there are such, packed, bias,
    inv_scale, residual, residual_scale.

    Attributes:
      chain: what it stands for.
      outputs: shape and dtype of its results: float32, int8, or both in this order.
      slot: where its weight is.
      is_native: whether the native kernels have it.
      is_worth_packing: whether they are faster though they have to pack the weight.
    """

    def __init__(
        self,
        graph: ir.Graph,
        chain: Chain,
        zero_points: Mapping[ir.Var, int],
        slot: layout.WeightSlot,
    ):
        site = chain.site.site
        assert site.weight is not None
        self.chain = chain
        self.slot = slot
        self.is_native = is_native(graph, chain.site)
        self._contraction = site.product
        self._weight_shape = graph.shape(site.weight)
        self._zero_point = zero_points[site.operands[0]]
        self._residual_zero_point = 0
        if chain.residual is not None and chain.residual_int8:
            self._residual_zero_point = zero_points[chain.residual]
        self._out_zero_point = 0 if chain.grid is None else zero_points[chain.grid]
        self._layout = None
        if self._contraction.window is not None:
            self._layout = ChannelsLast(self._contraction)
        dtypes = [jnp.float32] * chain.float_out + [jnp.int8] * (chain.grid is not None)
        shape = graph.shape(chain.output)
        self.outputs = [jax.ShapeDtypeStruct(shape, dtype) for dtype in dtypes]
        self.is_worth_packing = self._rows(shape) >= _ROWS_WORTH_PACKING

    def _rows(self, shape: Sequence[Any]) -> float:
        """How many outputs a channel has."""
        if not all(isinstance(size, int) for size in shape):
            return math.inf  # a size that varies: a batch, which may be of any size
        channels = math.prod(self._weight_shape[a] for a in self.chain.site.site.channel_axes)
        return math.prod(shape) / max(channels, 1)

    def __call__(self, operands: Mapping[str, jax.Array], natively: bool = True) -> tuple[Any, Any]:
        """The float32 and the int8 output; None for one that nobody reads.

        `natively`: by the kernels where this is compiled for CPU; else as XLA lowers it.
        """
        if not natively:
            return self.by_xla(operands)
        names = tuple(operands)

        def named(run: Any) -> Any:
            return lambda *arrays: run(dict(zip(names, arrays, strict=True)))

        results = choices.choose_by_platform(
            named(self.native), named(self.portable), self.outputs, list(operands.values())
        )
        return self.by_form(results)

    def by_xla(self, operands: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        """The same, as XLA lowers it on every platform."""
        return self.by_form(self.portable(operands))

    def by_form(self, results: Sequence[jax.Array]) -> tuple[Any, Any]:
        """The float32 and the int8 one of `outputs`; None for what is not there."""
        if not results:
            return None, None
        return (
            results[0] if self.chain.float_out else None,
            results[-1] if self.chain.grid is not None else None,
        )

    def native(self, operands: Mapping[str, Any]) -> Sequence[jax.Array]:
        """One call of the native kernels."""
        if self._layout is None:
            weight = operands.get("packed", operands["weight"])
            columns = self._weight_shape[1] if "packed" in operands else None
            results = native.dot(
                operands["x"], weight, operands["multiplier"], operands.get("bias"),
                columns=columns, **self._options(operands)
            )  # fmt: skip
            return results if isinstance(results, tuple) else (results,)
        results = self.conv_call(operands).run()
        results = results if isinstance(results, tuple) else (results,)
        return tuple(self._layout.back(result) for result in results)

    def conv_call(self, operands: Mapping[str, Any]) -> Call:
        """The call of a convolution, whose results are channels last."""
        given = self._layout
        assert given is not None
        x, contraction = undilated(operands["x"], self._contraction, self._zero_point)
        layout = given if contraction is self._contraction else ChannelsLast(contraction)
        packed = operands.get("packed")
        options = self._options(operands)
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
            groups=layout.window.groups,
            kernel_shape=None if packed is None else layout.kernel_shape(self._weight_shape),
            **options,
        )

    @property
    def is_plain_conv(self) -> bool:
        """True for a convolution whose input and result the kernels read and write as they are."""
        if self._layout is None or not self._layout.is_plain:
            return False
        return self._layout.window.is_undilated

    def _options(self, operands: Mapping[str, Any]) -> dict[str, Any]:
        out = residual = None
        if self.chain.grid is not None:
            out = native.Requantize(operands["inv_scale"], self._out_zero_point)
        if self.chain.residual is not None:
            residual = Residual(
                operands["residual"], operands.get("residual_scale", 1.0), self._residual_zero_point
            )
        return {
            "zero_point": self._zero_point,
            "subtract_zero_point": False,  # the bias does
            "activation": self.chain.clamps[0],
            "residual": residual,
            "activation_after": self.chain.clamps[1],
            "out": out,
            "float_out": self.chain.float_out,
        }

    def portable(self, operands: Mapping[str, jax.Array]) -> Sequence[jax.Array]:
        """The same in operations that XLA has everywhere."""
        arrays = [operands["x"]]
        arrays.insert(self.chain.site.site.weight_position, operands["weight"])
        y = int8.accumulate(self._contraction, arrays, [self._zero_point]).astype(jnp.float32)
        y = _clamp(epilogue(self.chain.site, y, operands), self.chain.clamps[0])
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
        if self._layout is None:
            return native.pack_dot(weight)
        window = self._layout.window
        return native.pack_conv(self._layout.kernel(weight), window.groups, window.dilation)

    def operands(self, state: Evaluation, linked: Collection[str] = ()) -> dict[str, jax.Array]:
        """What the call reads, of the arrays of the model and of the tensors so far.

        Args:
          state: the evaluation.
          linked: names that are left out.
        """
        site, residual = self.chain.site.site, self.chain.residual
        qparams, quantized = state.qparams, state.quantized
        found = {"weight": layout.get(qparams["params"], self.slot.int8)}
        found |= qparams["sites"][site.name]  # multiplier and bias
        if site.name in qparams.get("packed", {}):
            found["packed"] = qparams["packed"][site.name]
        if self.chain.grid is not None:
            found["inv_scale"] = quantized.inv_scale(self.chain.grid)
        if residual is not None and self.chain.residual_int8:
            found["residual_scale"] = quantized.scale(residual)
        if "x" not in linked:
            found["x"] = quantized.int8(site.operands[0])
        if residual is not None and "residual" not in linked:
            read = quantized.int8 if self.chain.residual_int8 else quantized.float32
            found["residual"] = read(residual)
        return {name: jnp.asarray(value) for name, value in found.items()}

    def keep(
        self, state: Evaluation, value: jax.Array | None, as_int8: jax.Array | None
    ) -> dict[ir.Var, jax.Array]:
        """The float output, if there is one; the int8 one is kept for those that read it."""
        if as_int8 is not None and self.chain.grid is not None:
            state.quantized.put(self.chain.output, as_int8, self.chain.grid)
        return {} if value is None else {self.chain.output: value}


def _clamp(y: jax.Array, bounds: tuple[float, float]) -> jax.Array:
    if bounds == NO_CLAMP:
        return y
    return lax.clamp(jnp.float32(bounds[0]), y, jnp.float32(bounds[1]))
