"""The ways to quantize a model, and how they differ: one record each."""

from __future__ import annotations

import dataclasses

from jaxquant.graph import kinds
from jaxquant.plan import behaviours

STATIC, DYNAMIC, WEIGHT_ONLY = "static", "dynamic", "weight_only"


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the sites of a plan are quantized.

    Attributes:
      kinds: the kinds of sites that have such a form.
      tensor_scales: the plan holds scales of tensors, and tensors stay int8 between sites.
      integer: sites compute on integers: int8 operands, int32 sums, an epilogue.  Else they
        compute in the model's dtype on a weight that is dequantized in the call.
      label: what the report calls a quantized site; `{numbers}` are what its weight holds.
      advice: what may help where the accuracy is poor; `{skip}` are the sites that it is lost at.
    """

    kinds: tuple[str, ...]
    tensor_scales: bool
    integer: bool
    label: str
    advice: str


MODES = {
    STATIC: Mode(
        kinds=tuple(behaviours.BY_KIND),
        tensor_scales=True,
        integer=True,
        label="int8",
        advice="another algo or skip={skip} may help",
    ),
    DYNAMIC: Mode(
        kinds=(*kinds.DOT_KINDS, kinds.LOOKUP_KIND),
        tensor_scales=False,
        integer=True,
        label="int8 (dynamic)",
        advice="skip={skip} or jaxquant.quant_weights may help",
    ),
    WEIGHT_ONLY: Mode(
        kinds=(*kinds.WEIGHTED_KINDS, kinds.LOOKUP_KIND),
        tensor_scales=False,
        integer=False,
        label="{numbers} weights",
        advice="a smaller group_size, weight_bits=8 or skip={skip} may help",
    ),
}
