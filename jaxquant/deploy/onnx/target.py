"""What an ONNX file is written for, and the form that its int8 weights take for that.

x86 multiplies uint8 activations by int8 weights in pairs.  With VNNI the products are summed in
int32.  Without it the sum of two products is an int16 that saturates (`vpmaddubsw`): 255 times 127
twice is 64770, and 32767 is what remains.  ONNX Runtime and OpenVINO take that loss without a word.

Measured with ONNX Runtime 1.32 and OpenVINO 2026.4, on products of the largest values, with the
processor's features hidden (AVX2; AVX-512 without VNNI):

- uint8 weights with zero point 128 are multiplied exactly in every form of ONNX Runtime's
  (QLinearConv, QLinearMatMul, QGemm, MatMulInteger), by wider and slower instructions.  OpenVINO
  has no integer kernels for them and computes in float32.
- A depthwise convolution does not add products in pairs: int8 weights are exact there.
- OpenVINO loses the zero point of a transposed convolution's uint8 weights, on every processor, and
  saturates on int8 ones: those weights are floats.
- ONNX Runtime multiplies two activations exactly.  OpenVINO saturates there too, unless the first
  has a zero point, which makes it compute in float32.
"""

from __future__ import annotations

import dataclasses
import enum

from jaxquant.deploy.lower.convolution import ConvForm

RUNTIMES = ("any", "onnxruntime")
PROCESSORS = ("any", "vnni", "arm", "gpu")


class WeightForm(enum.Enum):
    """The numbers that a weight is stored as, all of the same worth."""

    INT8 = "int8, zero point 0"
    UINT8 = "uint8, zero point 128"
    FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class Target:
    """What runs the file; the arguments of `jaxquant.export_onnx`.

    Raises:
      ValueError: there is no such runtime, or no such kind of processor.
    """

    runtime: str = "any"
    processors: str = "any"

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ValueError(f"runtime={self.runtime!r}: one of {_listed(RUNTIMES)}")
        if self.processors not in PROCESSORS:
            raise ValueError(
                f"processors={self.processors!r}: one of {_listed(PROCESSORS)}. 'any' is exact on "
                "all of them, x86 without VNNI included; the others give int8 weights, which x86 "
                "without VNNI multiplies wrongly"
            )

    @property
    def is_onnxruntime(self) -> bool:
        """True where no other runtime reads the file."""
        return self.runtime == "onnxruntime"

    @property
    def may_saturate(self) -> bool:
        """True where a sum of two products of uint8 and int8 may not fit."""
        return self.processors == "any"

    @property
    def first_factor_has_zero_point(self) -> bool:
        """True where the first of two multiplied activations must not have zero point 0."""
        return self.may_saturate and not self.is_onnxruntime

    def dot_weight(self) -> WeightForm:
        """The form of the weight of a dot."""
        return WeightForm.UINT8 if self.may_saturate else WeightForm.INT8

    def conv_weight(self, form: ConvForm) -> WeightForm:
        """The form of the weight of a convolution.

        Several filters for each input channel are no depthwise convolution: their products are
        summed in pairs.
        """
        if not self.may_saturate or form.is_depthwise:
            return WeightForm.INT8
        return WeightForm.FLOAT if form.is_transposed else WeightForm.UINT8


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
