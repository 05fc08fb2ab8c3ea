"""QuantizeLinear and DequantizeLinear of activations, weights and biases."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from jaxquant.deploy.onnx import elementwise
from jaxquant.deploy.onnx.builder import Builder, Value, straight
from jaxquant.deploy.onnx.target import Target, WeightForm
from jaxquant.plan.plan import Plan
from jaxquant.weights.quantize import LARGEST_BIAS


@dataclasses.dataclass(frozen=True)
class Weight:
    """An int8 weight with what one step of each output channel is worth.

    Attributes:
      int8: in ONNX's layout.
      scale: float32 [C], positive.
      steps: float32 [C], what one unit of the accumulator is worth: `scale` times the input's, as
        runtimes round it where such a scale exists.
      bias: float64 [C].
      axis: the axis of the channels.
    """

    int8: np.ndarray
    scale: np.ndarray
    steps: np.ndarray
    bias: np.ndarray | None
    axis: int


class Quantizer:
    """Emits the quantization of tensors by their entries in `qparams["tensors"]`.

    Args:
      builder: of the graph.
      plan: of the model.
      tensors, sites: what `qparams` holds under these names.
      target: what runs the file.
      first_factors: the entries of the activations that other activations are multiplied by.
    """

    def __init__(
        self,
        builder: Builder,
        plan: Plan,
        tensors: Mapping[str, Mapping[str, Any]],
        sites: Mapping[str, Mapping[str, Any]],
        target: Target,
        first_factors: Collection[str] = (),
    ) -> None:
        self.builder = builder
        self.target = target
        self._first_factors = first_factors if target.first_factor_has_zero_point else ()
        self._tensors = tensors
        self._sites = sites
        self._zero_points = {tensor.name: tensor.zero_point for tensor in plan.tensors}
        self._equalized = {tensor.name: tensor.scale for tensor in plan.tensors if tensor.channels}
        self._dequantized: dict[str, Value] = {}

    def site(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a site's epilogue."""
        return {key: np.asarray(array) for key, array in self._sites[name].items()}

    def scale(self, entry: str) -> float:
        """What one step of a tensor is worth; of an equalized one, to the weights behind it."""
        if entry in self._equalized:
            return float(np.float32(self._equalized[entry]))
        return float(np.asarray(self._tensors[entry]["scale"]))

    def is_equalized(self, entry: str) -> bool:
        """True for a tensor that is divided, channel by channel, before it is quantized."""
        return entry in self._equalized

    def restored(self, value: Value, entry: str) -> Value:
        """A dequantized tensor as it was before it was divided."""
        return self._multiplied(value, entry, 1) if self.is_equalized(entry) else value

    def _multiplied(self, value: Value, entry: str, power: int) -> Value:
        factors = np.asarray(self._tensors[entry]["scale"], np.float64) / self.scale(entry)
        array = (factors**power).astype(np.float32)
        array = array.reshape([1] * (value.rank - array.ndim) + list(array.shape))
        constant = Value(
            self.builder.constant(array, "equalization"), array.shape, straight(array.ndim)
        )
        return elementwise.apply(self.builder, "Mul", [value, constant])

    def zero_point(self, entry: str) -> int:
        return int(self._zero_points[entry])

    def quantize(self, value: Value, entry: str) -> Value:
        if self.is_equalized(entry):
            value = self._multiplied(value, entry, -1)
        value = self.builder.plain(value)
        name = self.builder.node("QuantizeLinear", [value.name, *self._grid(entry)], "quantize")
        return dataclasses.replace(value, name=name)

    def dequantize(self, value: Value, entry: str) -> Value:
        """The float of an int8 value; one node, however many read it."""
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
        zero_point = self.zero_point(entry)
        if entry in self._first_factors:
            is_unsigned = zero_point != np.iinfo(np.int8).min
        else:
            is_unsigned = self.target.is_onnxruntime or zero_point != 0
        return np.uint8(zero_point + 128) if is_unsigned else np.int8(zero_point)

    def _grid(self, entry: str) -> list[str]:
        scale = self.builder.constant(np.float32(self.scale(entry)), "scale")
        return [scale, self.builder.constant(self.zero(entry), "zero_point")]

    def weight(self, weight: Weight, form: WeightForm) -> str:
        """The dequantized weight: an initialiser of integers and its scales, or one of floats."""
        if form is WeightForm.FLOAT:
            along = [1] * weight.int8.ndim
            along[weight.axis] = weight.scale.size
            return self.builder.constant(weight.int8 * weight.scale.reshape(along), "weight")
        integers, zero_point = self.integers(weight.int8, weight.scale.shape, form)
        scale = self.builder.constant(weight.scale, "weight_scale")
        axis = {"axis": weight.axis} if weight.scale.ndim else {}
        inputs = [integers, scale, zero_point]
        return self.builder.node("DequantizeLinear", inputs, "weight", **axis)

    def integers(
        self, int8: np.ndarray, zero_shape: tuple[int, ...], form: WeightForm
    ) -> tuple[str, str]:
        """The initialisers of a weight's integers and of their zero point, of this shape.

        int8 ones are shared with no other node: ONNX Runtime replaces both, once for each node,
        where the session option session.x64quantprecision makes weights uint8, and fails to load
        the model where they are replaced already.
        """
        is_unsigned = form is WeightForm.UINT8
        dtype, offset = (np.uint8, 128) if is_unsigned else (np.int8, 0)
        shifted = (int8.astype(np.int16) + offset).astype(dtype)
        zero_point = np.full(zero_shape, offset, dtype)
        return (
            self.builder.constant(shifted, f"weight_{shifted.dtype}", is_shared=is_unsigned),
            self.builder.constant(zero_point, "weight_zero_point", is_shared=is_unsigned),
        )

    def bias(self, weight: Weight) -> str | None:
        """The dequantized int32 bias, whose steps are those of the accumulator."""
        if weight.bias is None:
            return None
        int32 = np.rint(weight.bias / weight.steps.astype(np.float64)).astype(np.int32)
        inputs = [
            self.builder.constant(int32, "bias_int32"),
            self.builder.constant(weight.steps, "bias_scale"),
            self.builder.constant(np.zeros(int32.shape, np.int32), "bias_zero_point"),
        ]
        return self.builder.node("DequantizeLinear", inputs, "bias", axis=0)


def make_weight(
    int8: np.ndarray,
    axis: int,
    multiplier: np.ndarray,
    bias: np.ndarray | None,
    input_scale: float,
) -> Weight:
    """Fold a site's multiplier into the scales of its weight.

    A negative multiplier (of a BatchNorm, say) turns the weight's sign, one of zero makes the
    weight zero.  Where the bias is so large in steps of the accumulator that int32 does not hold
    it, the steps of that channel are made larger.

    Args:
      int8: the weight in ONNX's layout.
      axis: of its output channels.
      multiplier: [C], what one unit of the accumulator is worth.
      bias: [C] or None.
      input_scale: of the tensor that the weight meets.
    """
    along = [1] * int8.ndim
    along[axis] = -1
    multiplier = multiplier.astype(np.float64)
    worth = np.abs(multiplier)
    steps = worth if bias is None else np.maximum(worth, np.abs(bias) / LARGEST_BIAS)
    least = 2.0**-126 * max(input_scale, 1.0)
    steps = np.maximum(np.where(steps > 0, steps, input_scale), least).astype(np.float32)
    ratio = np.sign(multiplier) * worth / steps.astype(np.float64)
    exact = np.abs(np.abs(ratio) - 1) < 1e-5
    ratio = np.where(exact, np.sign(ratio), ratio).reshape(along)
    folded = np.clip(np.rint(int8 * ratio), -127, 127).astype(np.int8)
    scale = _factor(steps, np.float32(input_scale))
    return Weight(folded, scale, steps, None if bias is None else bias.astype(np.float64), axis)


def _factor(product: np.ndarray, other: np.float32) -> np.ndarray:
    """float32 [C] that gives `product` when multiplied by `other` in float32, or the next to it."""
    nearest = (product.astype(np.float64) / other).astype(np.float32)
    below, above = (np.nextafter(nearest, np.float32(bound)) for bound in (0, np.inf))
    choices = [nearest, below, above]
    return np.select([choice * other == product for choice in choices], choices, nearest)
