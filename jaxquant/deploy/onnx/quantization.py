"""QuantizeLinear and DequantizeLinear of activations, weights and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from jaxquant.deploy.lower.scales import Scales
from jaxquant.deploy.lower.values import Value, straight
from jaxquant.deploy.lower.weights import Weight
from jaxquant.deploy.onnx import elementwise
from jaxquant.deploy.onnx.builder import Builder
from jaxquant.deploy.onnx.target import Target, WeightForm


class Quantizer:
    """Emits the quantization of tensors and weights.

    Args:
      builder: of the graph.
      scales: of the int8 tensors.
      target: what runs the file.
      first_factors: the entries of the activations that other activations are multiplied by.
    """

    def __init__(
        self,
        builder: Builder,
        scales: Scales,
        target: Target,
        first_factors: Collection[str] = (),
    ) -> None:
        self.builder = builder
        self.target = target
        self._first_factors = first_factors if target.first_factor_has_zero_point else ()
        self._scales = scales
        self._dequantized: dict[str, Value] = {}

    def restored(self, value: Value, entry: str) -> Value:
        """A dequantized tensor as it was before it was divided."""
        return self._multiplied(value, entry, 1) if self._scales.is_divided(entry) else value

    def _multiplied(self, value: Value, entry: str, power: int) -> Value:
        array = (self._scales.divisors(entry) ** power).astype(np.float32)
        array = array.reshape([1] * (value.rank - array.ndim) + list(array.shape))
        constant = Value(
            self.builder.constant(array, "divisors"), array.shape, straight(array.ndim)
        )
        return elementwise.apply(self.builder, "Mul", [value, constant])

    def quantize(self, value: Value, entry: str) -> Value:
        if self._scales.is_divided(entry):
            value = self._multiplied(value, entry, -1)
        value = self.builder.plain(value)
        name = self.builder.node("QuantizeLinear", [value.name, *self._grid(entry)], "quantize")
        return dataclasses.replace(value, name=name)

    def dequantize(self, value: Value, entry: str) -> Value:
        """The float of an int8 value; one node, however many read it."""
        # By the tensor of the graph: a transposed value is another one.
        if value.name not in self._dequantized:
            name = self.builder.node(
                "DequantizeLinear", [value.name, *self._grid(entry)], "dequantize"
            )
            self._dequantized[value.name] = dataclasses.replace(value, name=name)
        return self._dequantized[value.name]

    def zero(self, entry: str) -> np.int8 | np.uint8:
        """The integer that stands for zero in the graph.

        A tensor with a zero point is uint8, 128 more than in qapply: OpenVINO runs what is never
        negative in int8 only so.  The first factor of a product of two activations is whichever
        type does not make its zero point 0, see `jaxquant.deploy.onnx.target`.
        """
        zero_point = self._scales.zero_point(entry)
        if entry in self._first_factors:
            is_unsigned = zero_point != np.iinfo(np.int8).min
        else:
            is_unsigned = self.target.is_onnxruntime or zero_point != 0
        return np.uint8(zero_point + 128) if is_unsigned else np.int8(zero_point)

    def _grid(self, entry: str) -> list[str]:
        scale = self.builder.constant(np.float32(self._scales.scale(entry)), "scale")
        return [scale, self.builder.constant(self.zero(entry), "zero_point")]

    def weight(self, weight: Weight, form: WeightForm, is_table: bool = False) -> str:
        """The dequantized weight: an initialiser of integers and its scales, or one of floats.

        With `is_table` rows of its transpose are looked up too.
        """
        # Each channel's scale is multiplied in now, since no integers are stored.
        if form is WeightForm.FLOAT:
            along = [1] * weight.int8.ndim
            along[weight.axis] = weight.scale.size
            return self.builder.constant(weight.int8 * weight.scale.reshape(along), "weight")
        integers, zero_point = self.integers(weight.int8, weight.scale.shape, form, is_table)
        scale = self.builder.constant(weight.scale, "weight_scale")
        axis = {"axis": weight.axis} if weight.scale.ndim else {}
        inputs = [integers, scale, zero_point]
        return self.builder.node("DequantizeLinear", inputs, "weight", **axis)

    def integers(
        self,
        int8: np.ndarray,
        zero_shape: tuple[int, ...],
        form: WeightForm,
        is_table: bool = False,
    ) -> tuple[str, str]:
        """The initialisers of a weight's integers and of their zero point, of this shape.

        int8 ones are shared with no other node: ONNX Runtime replaces both, once for each node,
        where the session option session.x64quantprecision makes weights uint8, and fails to load
        the model where they are replaced already.  A table of which rows are looked up too is in
        the file once, transposed.
        """
        is_unsigned = form is WeightForm.UINT8
        dtype, offset = (np.uint8, 128) if is_unsigned else (np.int8, 0)
        # The same integers plus 128, and 128 as their zero point.
        shifted = (int8.astype(np.int16) + offset).astype(dtype)
        zero_point = np.full(zero_shape, offset, dtype)
        hint = f"weight_{shifted.dtype}"
        if is_table:
            name = self.builder.transposed_constant(shifted, hint)
        else:
            name = self.builder.constant(shifted, hint, is_shared=is_unsigned)
        return (
            name,
            self.builder.constant(zero_point, "weight_zero_point", is_shared=is_unsigned),
        )

    def bias(self, weight: Weight) -> str | None:
        """The dequantized int32 bias, whose steps are those of the accumulator."""
        int32 = weight.bias_steps()
        if int32 is None:
            return None
        inputs = [
            # Runtimes recognize a bias by its scale: that of the input times that of the weight.
            self.builder.constant(int32, "bias_int32"),
            self.builder.constant(weight.steps, "bias_scale"),
            self.builder.constant(np.zeros(int32.shape, np.int32), "bias_zero_point"),
        ]
        return self.builder.node("DequantizeLinear", inputs, "bias", axis=0)

    def float_bias(self, weight: Weight) -> str | None:
        """The bias as qapply adds it.

        Half a step of the accumulator, which `bias` may be off, is enough to round one value in a
        thousand another way where the result is quantized again, perhaps behind a normalization.
        """
        if weight.bias is None:
            return None
        return self.builder.constant(weight.bias.astype(np.float32), "bias")
